// Sorts the rows of a table by the column whose heading is clicked. Without it, the page shows all the same.
for (const heading of document.querySelectorAll("table.runs thead tr:last-child th")) {
  const sort = () => {
    const table = heading.closest("table"), column = [...heading.parentNode.children].indexOf(heading);
    const isDown = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", isDown ? "descending" : "ascending");
    const key = row => row.children[column].dataset.order;
    const compare = (a, b) => key(a) === "" || key(b) === "" ? (key(a) === "") - (key(b) === "")
      : (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b)) * (isDown ? -1 : 1);
    for (const body of table.tBodies) body.append(...[...body.rows].filter(row => row.className !== "set").sort(compare));
  };
  heading.tabIndex = 0;
  heading.classList.add("sortable");
  heading.addEventListener("click", sort);
  heading.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
