(() => {
  "use strict";
  document.documentElement.classList.add("js");
  const opened = () => {
    const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", opened);
  opened();

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });

  const table = document.getElementById("kinds");
  if (!table) return;
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const rows = [...body.rows];
      rows.sort((a, b) => sign * compare(value(a, column), value(b, column)));
      body.append(...rows);
    });
  });

  const text = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = document.querySelector("input[name=status]:checked").value;
    let count = 0;
    for (const row of body.rows) {
      const fits = words.every((word) => row.dataset.search.includes(word));
      row.hidden = !(fits && (status === "all" || row.dataset.status === status));
      document.getElementById(row.dataset.section).hidden = row.hidden;
      count += row.hidden ? 0 : 1;
    }
    shown.textContent = `${count} of ${body.rows.length} shown`;
  };
  text.addEventListener("input", apply);
  for (const one of document.querySelectorAll("input[name=status]")) one.addEventListener("change", apply);
  apply();
})();
