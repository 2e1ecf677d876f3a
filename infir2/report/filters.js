// Samples and groups of responses: which are shown, by their text, step and verdict.
for (const box of document.querySelectorAll(".filtered")) {
  const [search, ...selects] = box.querySelectorAll(".filters input, .filters select"), count = box.querySelector("output");
  const items = [...box.querySelectorAll(".items > details")].map((node) => ({ node, text: node.textContent.toLowerCase() }));
  const filter = () => {
    const wanted = search.value.toLowerCase();
    let shown = 0;
    for (const { node, text } of items) {
      node.hidden = !(text.includes(wanted) && selects.every((each) => !each.value || node.dataset[each.name] === each.value));
      shown += !node.hidden;
    }
    count.value = `${shown} of ${items.length}`;
  };
  for (const input of [search, ...selects]) input.addEventListener("input", filter);
  box.querySelector(".filters").hidden = false;
  filter();
}
