// Values under the pointer: a rule at the nearest step and a small box with every line's value there.
"use strict";
for (const svg of document.querySelectorAll("svg.chart")) {
  let lines = null, rule = null, box = null;
  const [left, top, right, bottom] = svg.dataset.area.split(" ").map(Number);
  const format = (text) => {
    const value = Number(text);
    if (svg.dataset.percent === "1") return (100 * value).toPrecision(3) + " %";
    const size = Math.abs(value);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : size > 0 && size < 1e-3 ? value.toExponential(2) : String(value);
  };
  const read = () => {
    lines = [...svg.querySelectorAll("path[data-x]")].map((path) => {
      let step = 0;
      const steps = path.dataset.x.split(" ").map((delta) => (step += Number(delta)));
      const places = [...path.getAttribute("d").matchAll(/([\d.-]+) ([\d.-]+)/g)].map((pair) => Number(pair[1]));
      return { label: path.dataset.label, color: getComputedStyle(path).stroke, steps, places, values: path.dataset.y.split(" ") };
    });
    rule = document.createElementNS(svg.namespaceURI, "path");
    rule.setAttribute("class", "rule");
    svg.append(rule);
    box = document.createElement("div");
    box.className = "tip";
    svg.parentElement.append(box);
  };
  const nearest = (places, x) => {
    let best = 0;
    for (let index = 1; index < places.length; index++) if (Math.abs(places[index] - x) < Math.abs(places[best] - x)) best = index;
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    if (!lines) read();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const hits = lines.map((line) => ({ line, index: nearest(line.places, at.x) }));
    if (!hits.length) return;
    const close = hits.reduce((a, b) => (Math.abs(b.line.places[b.index] - at.x) < Math.abs(a.line.places[a.index] - at.x) ? b : a));
    const place = close.line.places[close.index];
    rule.setAttribute("d", `M${place} ${top}V${bottom}`);
    box.replaceChildren(`step ${close.line.steps[close.index].toLocaleString("en")}`);
    for (const { line, index } of hits) {
      if (Math.abs(line.places[index] - place) > 6) continue;
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.style.background = line.color;
      row.append(dot, `${line.label} ${format(line.values[index])}`);
      box.append(row);
    }
    const frame = svg.getBoundingClientRect(), parent = box.offsetParent.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
    const x = frame.left - parent.left + place * scale;
    box.style.left = (place > (left + right) / 2 ? x - box.offsetWidth - 10 : x + 10) + "px";
    box.style.top = frame.top - parent.top + top * scale + "px";
    svg.classList.add("hovered");
    box.hidden = false;
  });
  svg.addEventListener("pointerleave", () => {
    svg.classList.remove("hovered");
    if (box) box.hidden = true;
  });
}
