"use strict";
document.documentElement.classList.add("js"); // without, browsers show their own players

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    const order = now === "none" ? head.dataset.first
      : now === "ascending" ? "descending" : "ascending";
    for (const other of heads) other.setAttribute("aria-sort", other === head ? order : "none");
    const value = (row) => parseFloat(row.cells[column]?.dataset.value);
    const known = [...body.rows].filter((row) => !Number.isNaN(value(row)));
    const unknown = [...body.rows].filter((row) => Number.isNaN(value(row)));
    known.sort((a, b) => (order === "ascending" ? 1 : -1) * (value(a) - value(b)));
    body.append(...known, ...unknown); // what has no figure is last, whichever way
  }));
}

// One player for all: browsers refuse to make hundreds.
const sound = new Audio();
let playing = null;

function stop() {
  sound.pause();
  playing?.setAttribute("aria-pressed", "false");
  playing = null;
}

function play(button) {
  stop();
  playing = button;
  button.setAttribute("aria-pressed", "true");
  sound.src = document.getElementById(button.dataset.sound).src;
  sound.play().then(follow, () => {}); // stopped before it began
}

function follow() {
  if (!playing) return;
  playing.style.setProperty("--at", sound.duration ? sound.currentTime / sound.duration : 0);
  requestAnimationFrame(follow);
}

sound.addEventListener("ended", stop);
sound.addEventListener("error", () => {
  playing?.classList.add("broken");
  stop();
});

const grid = document.querySelector("table.samples");
grid?.addEventListener("click", (event) => {
  const button = event.target.closest(".play");
  if (button) button === playing ? stop() : play(button);
});
grid?.addEventListener("keydown", (event) => {
  const [across, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1],
    ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  const cell = event.target.closest(".play") && event.target.closest("td");
  if (event.key === "Escape") stop();
  if (!cell || across === down) return;
  const rows = [...grid.tBodies[0].rows].filter((row) => row.offsetParent !== null);
  let row = rows.indexOf(cell.parentElement);
  let column = cell.cellIndex;
  let next = null;
  do { // past cells that have nothing to play
    row += down;
    column += across;
    next = rows[row]?.cells[column];
  } while (next && !next.querySelector(".play"));
  if (next) {
    next.querySelector(".play").focus();
    event.preventDefault(); // the page stays where it is
  }
});

document.getElementById("all-heard")?.addEventListener("click", ({ currentTarget: button }) => {
  const open = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(open));
  for (const details of document.querySelectorAll("details.heard")) details.open = open;
});
