"use strict";
// The address keeps the view: #metric=image_ap&sort=t1-image_ap:2:desc
const state = new URLSearchParams(location.hash.slice(1));
const select = document.getElementById("metric");

function showMetric(name) {
  if (!select || ![...select.options].some((option) => option.value === name)) return;
  select.value = name;
  for (const part of document.querySelectorAll("[data-metric]")) part.hidden = part.dataset.metric !== name;
}

function sort(table, column, direction) {
  const heads = table.tHead.rows[0].cells;
  if (!heads[column]) return;
  const sign = direction === "asc" ? 1 : -1;
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => row.className !== "setting");
    const key = (row) => row.cells[column].dataset.v ?? "";
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if ((x === "") !== (y === "")) return x === "" ? 1 : -1;  // what is missing comes last
      const numbers = x !== "" && !isNaN(x) && !isNaN(y);
      return sign * (numbers ? x - y : x.localeCompare(y, undefined, { numeric: true }));
    });
    body.append(...rows);
  }
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}

function keep(name, value) {
  state.set(name, value);
  try { history.replaceState(null, "", "#" + state); } catch { /* a view without history */ }
}

function restore() {
  showMetric(state.get("metric"));
  const [, id, column, direction] = /^(.*):(\d+):(asc|desc)$/.exec(state.get("sort") ?? "") ?? [];
  const table = id && document.getElementById(id);
  if (table && table.tHead) sort(table, Number(column), direction);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("thead button");
  if (!button) return;
  const head = button.parentElement, table = head.closest("table");
  const first = head.classList.contains("text") ? "asc" : "desc";
  const now = { ascending: "asc", descending: "desc" }[head.getAttribute("aria-sort")];
  const direction = now ? (now === "asc" ? "desc" : "asc") : first;
  sort(table, head.cellIndex, direction);
  keep("sort", `${table.id}:${head.cellIndex}:${direction}`);
});
if (select) select.addEventListener("change", () => { showMetric(select.value); keep("metric", select.value); });
restore();
