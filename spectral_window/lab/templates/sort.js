for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const cell = (row) => row.cells[column];
      const key = (row) => cell(row).dataset.sort ?? cell(row).textContent.trim();
      const lacks = (row) => key(row) === "" || cell(row).classList.contains("missing");
      const compare = (a, b) => {
        if (lacks(a) || lacks(b)) return lacks(a) - lacks(b); // what is missing stays below
        const [x, y] = [Number(key(a)), Number(key(b))];
        const order = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
        return up ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
