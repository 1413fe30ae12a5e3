// What the page can do beyond showing: tables sort by a column, and figures open larger.
// Everything is readable without it.
"use strict";

// The number that a cell begins with, such as -0.05, 1,000.5 or 96.5 ± 0.9; else nothing.
function numberOf(text) {
  const found = text.match(/^[-+−]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?/);
  return found ? Number(found[0].replaceAll(",", "").replace("−", "-")) : null;
}

// Rows without a number come last, in either direction.
function compare(one, other, sign) {
  const [a, b] = [numberOf(one), numberOf(other)];
  if (a !== null && b !== null) return sign * (a - b);
  if (a !== null || b !== null) return a !== null ? -1 : 1;
  return sign * one.localeCompare(other, "en", { numeric: true });
}

function sortBy(table, column, header) {
  const falls = header.getAttribute("aria-sort") === "ascending";
  const sign = falls ? -1 : 1;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  rows.sort((one, other) =>
    compare(one.cells[column].textContent, other.cells[column].textContent, sign));
  body.append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", falls ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sorts")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.append(...header.childNodes);
    button.title = "Sort by this column";
    button.addEventListener("click", () => sortBy(table, column, header));
    header.append(button);
  });
}

const dialog = document.createElement("dialog");
const close = document.createElement("button");
close.textContent = "Close";
close.addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // beside the picture
});
document.body.append(dialog);

function enlarge(image) {
  const large = image.cloneNode();
  large.removeAttribute("width");
  large.removeAttribute("height");
  const caption = document.createElement("p");
  caption.textContent = image.alt;
  dialog.setAttribute("aria-label", image.alt);
  dialog.replaceChildren(close, large, caption);
  dialog.showModal();
}

for (const image of document.querySelectorAll("figure > img")) {
  const button = document.createElement("button");
  button.className = "zoom";
  button.setAttribute("aria-label", `Enlarge: ${image.alt}`);
  button.addEventListener("click", () => enlarge(image));
  image.replaceWith(button);
  button.append(image);
}
