"use strict";

// Sorts and filters the rows that are there. Without it the page is a plain table.
const table = document.getElementById("board");
const form = document.getElementById("filters");
const body = table.tBodies[0];
const rows = Array.from(body.rows);
const headers = Array.from(table.tHead.rows[0].cells);
const filters = Array.from(form.querySelectorAll("select[data-filter]"));
const sorting = document.getElementById("sort");
const numbers = new Set(["radius", "clean", "empirical", "certified"]);
const place = new Map(headers.map((header, index) => [header.dataset.key, index]));
const cell = (row, key) => row.cells[place.get(key)];
const value = (row, key) => cell(row, key).dataset.value;

function compare(key, direction) {
  return (a, b) => {
    const [left, right] = [value(a, key), value(b, key)];
    if (left === "" || right === "") return (left === "") - (right === "");
    return direction * (numbers.has(key) ? Number(left) - Number(right) : left.localeCompare(right));
  };
}

function sort(key, direction) {
  for (const header of headers) {
    const chosen = header.dataset.key === key;
    if (chosen) header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    else header.removeAttribute("aria-sort");
  }
  sorting.value = key ? `${key} ${direction}` : "";
  body.append(...(key ? rows.toSorted(compare(key, direction)) : rows));
}

function filter() {
  let shown = 0;
  for (const row of rows) {
    row.hidden = !filters.every((one) => one.value === "" || value(row, one.dataset.filter) === one.value);
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = `${shown} of ${rows.length} rows`;
}

function addChoices(select) {
  const key = select.dataset.filter;
  const found = new Map(rows.map((row) => [value(row, key), cell(row, key).textContent.trim()]));
  const order = numbers.has(key) ? (a, b) => a[0] - b[0] : (a, b) => a[0].localeCompare(b[0]);
  for (const [chosen, text] of Array.from(found).sort(order)) select.add(new Option(text, chosen));
  select.addEventListener("change", filter);
}

for (const header of headers) {
  const key = header.dataset.key;
  const first = numbers.has(key) && key !== "radius" ? -1 : 1;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = header.textContent;
  button.addEventListener("click", () => {
    const now = header.getAttribute("aria-sort");
    sort(key, now === null ? first : now === "ascending" ? -1 : 1);
  });
  sorting.add(new Option(`${header.textContent}, ${first > 0 ? "ascending" : "descending"}`, `${key} ${first}`));
  sorting.add(new Option(`${header.textContent}, ${first > 0 ? "descending" : "ascending"}`, `${key} ${-first}`));
  header.replaceChildren(button);
}
sorting.addEventListener("change", () => {
  const [key, direction] = sorting.value.split(" ");
  sort(key, Number(direction));
});
form.addEventListener("submit", (event) => event.preventDefault());
filters.forEach(addChoices);
filter();
form.hidden = false;
