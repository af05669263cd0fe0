// A click on a column's button sorts the table by it; a second click turns the order round. Empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value;
    const numbers = [...body.rows].every(row => key(row) === "" || !Number.isNaN(Number(key(row))));
    const compare = (a, b) => numbers ? Number(a) - Number(b) : a.localeCompare(b, undefined, {numeric: true});
    const rows = [...body.rows].sort((a, b) => {
      if ((key(a) === "") !== (key(b) === "")) return key(a) === "" ? 1 : -1;
      return sign * compare(key(a), key(b));
    });
    body.append(...rows);
  }));
}
