// What the sections of the page share: elements, pictures, and one computation at a time.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new canvas of this many pixels a side, with words for those who cannot see it. */
export function makeCanvas(size, words) {
  const canvas = document.createElement("canvas");
  canvas.width = size;
  canvas.height = size;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", words);
  return canvas;
}

/** Draw an image (3, size, size) in [-1, 1], rounded as `to_uint8` in common/data.py does it. */
export function drawImage(canvas, image) {
  const count = image.length / 3;
  const size = Math.sqrt(count);
  const pixels = new ImageData(size, size);
  for (let i = 0; i < count; i += 1) {
    for (let channel = 0; channel < 3; channel += 1) {
      const value = image[channel * count + i];
      pixels.data[4 * i + channel] = Math.round((value + 1) * 127.5); // is cut to 0 … 255
    }
    pixels.data[4 * i + 3] = 255;
  }
  canvas.width = size;
  canvas.height = size;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** The whole number in an input, kept within its min and max. */
export function numberIn(input) {
  const value = Math.round(Number(input.value)) || 0;
  const number = Math.min(Number(input.max), Math.max(Number(input.min), value));
  input.value = String(number);
  return number;
}

/**
 * Make `work` run once at a time. Of the calls that come meanwhile only the last one is made, when
 * the running one has ended; `work` can ask `isStale()` and stop early. What fails is said in
 * `status`.
 */
export function oneAtATime(status, work) {
  let isRunning = false;
  let isWanted = false;
  return async () => {
    isWanted = true;
    if (isRunning) return;
    isRunning = true;
    while (isWanted) {
      isWanted = false;
      try {
        await work(() => isWanted);
      } catch (error) {
        status.textContent = `This did not work: ${error.message}`;
      }
    }
    isRunning = false;
  };
}

/** Seconds since `start`, a time of performance.now(), in words. */
export const secondsSince = (start) => `${((performance.now() - start) / 1000).toFixed(1)} s`;
