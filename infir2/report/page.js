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
// A reload may add runs, charts and samples: each is found again by its headings and its own text.
const place = (node) => {
  const section = node.closest("section"), fold = node.parentElement.closest("details");
  const above = section ? [...section.querySelectorAll("h3")].filter((h3) => h3.compareDocumentPosition(node) & 4).pop() : null;
  const title = node.closest("figure")?.querySelector("h4");
  return [section?.id, above?.textContent, title?.textContent, fold ? ownText(fold) : ""].join("|");
};
// Without a leading count and what follows it, which change from page to page: "3 events, the last 2".
const ownText = (fold) => fold.querySelector("summary").textContent.replace(/^[\d,]+ (event|flat|key).*/, "$1");
const fields = () => keyed(".controls select, .controls input, .filters select, .filters input", (field) => field.name || field.type);
const folds = () => keyed("details", ownText);
// [[key, node], ...]; of nodes that are alike each has its number.
const keyed = (selector, name) => {
  const counts = new Map();
  return [...document.querySelectorAll(selector)].map((node) => {
    const key = `${place(node)}|${name(node)}`, count = counts.get(key) || 0;
    counts.set(key, count + 1);
    return [`${key}|${count}`, node];
  });
};
const accepts = (field, value) => value !== undefined && (!field.options || [...field.options].some((each) => each.value === value));
try {
  const kept = JSON.parse(sessionStorage.getItem(location.pathname));
  sessionStorage.removeItem(location.pathname);
  if (kept) {
    for (const [key, field] of fields()) if (accepts(field, kept.fields[key])) field.value = kept.fields[key];
    for (const [key, fold] of folds()) fold.open = kept.open.includes(key);
    for (const box of document.querySelectorAll(".filters input")) box.dispatchEvent(new Event("input"));
    if (controls && controls.restore) controls.restore();
    scrollTo(0, kept.top);
  }
} catch {} // a browser that stores nothing
const seconds = Number(document.body.dataset.reload);
if (seconds) {
  setTimeout(() => {
    try {
      const values = fields().map(([key, field]) => [key, field.value]);
      const open = folds().filter(([, fold]) => fold.open).map(([key]) => key);
      const kept = { fields: Object.fromEntries(values), open, top: scrollY };
      sessionStorage.setItem(location.pathname, JSON.stringify(kept));
    } catch {} // a browser that stores nothing
    location.reload();
  }, 1000 * seconds);
}
