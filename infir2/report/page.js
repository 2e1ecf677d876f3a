// Commands that can be copied, and the page of a run that still trains: it loads itself again.
for (const block of document.querySelectorAll("pre.command")) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(block);
    try { await navigator.clipboard.writeText(block.textContent); } catch { document.execCommand("copy"); }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  block.parentElement.prepend(button);
}
// What the reader has set and opened stays, also on the last page, which no longer reloads.
const fields = () => [...document.querySelectorAll(".controls select, .controls input, .filters select, .filters input")];
const folds = () => [...document.querySelectorAll("details")];
try {
  const kept = JSON.parse(sessionStorage.getItem(location.pathname));
  sessionStorage.removeItem(location.pathname);
  if (kept) {
    fields().forEach((field, index) => { if (kept.fields[index]) field.value = kept.fields[index]; });
    folds().forEach((fold, index) => (fold.open = Boolean(kept.open[index])));
    for (const box of document.querySelectorAll(".filters input")) box.dispatchEvent(new Event("input"));
    if (controls && controls.restore) controls.restore();
    scrollTo(0, kept.top);
  }
} catch {} // a browser that stores nothing
const seconds = Number(document.body.dataset.reload);
if (seconds) {
  setTimeout(() => {
    try {
      const kept = { fields: fields().map((field) => field.value), open: folds().map((fold) => fold.open), top: scrollY };
      sessionStorage.setItem(location.pathname, JSON.stringify(kept));
    } catch {} // a browser that stores nothing
    location.reload();
  }, 1000 * seconds);
}
