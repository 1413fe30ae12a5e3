// Starts the sections of the page. Only the generator of faces is loaded at once.

import { startAttributes } from "./attributes.js";
import { startDigits } from "./digits.js";
import { startDraw } from "./draw.js";
import { startFaces } from "./faces.js";

startFaces();
startDigits();
startDraw();
startAttributes().catch((error) => {
  document.getElementById("attributes-status").textContent = `This did not work: ${error.message}`;
});
