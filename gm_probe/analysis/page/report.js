"use strict";
const status = document.querySelector(".status");

function key(row, index) {
  const cell = row.cells[index];
  const text = cell.textContent.trim();
  return { empty: text.startsWith("—"), number: "order" in cell.dataset ? Number(cell.dataset.order) : NaN, text };
}

function compare(a, b, direction) {
  if (a.empty !== b.empty) return a.empty ? 1 : -1; // what is undefined stands last, whichever way
  if (!Number.isNaN(a.number) && !Number.isNaN(b.number)) return direction * (a.number - b.number);
  return direction * a.text.localeCompare(b.text, "en", { numeric: true });
}

document.querySelectorAll("thead button").forEach((button) => {
  button.addEventListener("click", () => {
    const header = button.parentElement;
    const table = header.closest("table");
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const index = header.cellIndex;
    const rows = [...table.tBodies[0].rows].map((row) => [key(row, index), row]);
    rows.sort((a, b) => compare(a[0], b[0], down ? -1 : 1));
    table.tBodies[0].append(...rows.map(([, row]) => row));
    status.textContent = `sorted by ${button.textContent}, ${down ? "descending" : "ascending"}`;
  });
});

// what is folded on the screen is wanted on paper
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => {
  for (const each of folded) each.open = false;
});
