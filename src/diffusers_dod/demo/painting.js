// A drag from a cell of the codes to others copies its code to them; a click (or Enter) draws the cell's code anew.
// Either triggers `select` with the cells of the stroke, the first one being the source.
let stroke = null;
let isDrag = false;
const cellOf = (target) => target?.closest?.(".cell");
const send = (cells) => trigger("select", { path: cells.map((cell) => JSON.parse(cell.dataset.place)) });

element.addEventListener("pointerdown", (event) => {
  const cell = cellOf(event.target);
  stroke = cell && event.isPrimary && event.button === 0 ? [cell] : null;
  isDrag = false;
});
element.addEventListener("pointermove", (event) => {
  // The pointer may be captured by the first cell, as it always is on a touch screen.
  const cell = stroke && cellOf(document.elementFromPoint(event.clientX, event.clientY));
  if (cell && !stroke.includes(cell)) {
    isDrag = true;
    stroke.push(cell);
    cell.style.background = stroke[0].style.background;
  }
});
const endStroke = () => {
  if (isDrag && stroke) send(stroke);
  stroke = null;
};
addEventListener("pointerup", endStroke);
addEventListener("pointercancel", endStroke);
element.addEventListener("click", (event) => {
  const cell = cellOf(event.target);
  if (cell && !isDrag) {
    cell.classList.add("busy");
    send([cell]);
  }
  isDrag = false;
});
