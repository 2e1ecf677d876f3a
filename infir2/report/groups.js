// Groups of responses: which are shown, by their text, their step and how many responses are right.
"use strict";
for (const box of document.querySelectorAll(".groups")) {
  const [search, step, kind] = box.querySelectorAll("input, select"), count = box.querySelector("output");
  const groups = [...box.querySelectorAll("details.group")].map((node) => ({ node, text: node.textContent.toLowerCase() }));
  const filter = () => {
    const wanted = search.value.toLowerCase();
    let shown = 0;
    for (const { node, text } of groups) {
      node.hidden = !(text.includes(wanted) && (!step.value || node.dataset.step === step.value) && (!kind.value || node.dataset.kind === kind.value));
      shown += !node.hidden;
    }
    count.value = `${shown} of ${groups.length} groups`;
  };
  for (const input of [search, step, kind]) input.addEventListener("input", filter);
  filter();
}
