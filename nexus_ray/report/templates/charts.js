"use strict";
// Tooltips for cells and curves, and legends that hide a curve. The drawings are complete without this script.
(() => {
  const tip = document.getElementById("tip");

  function place(event) {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 16, innerWidth - box.width - 8);
    const below = event.clientY + 18 + box.height < innerHeight;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (below ? event.clientY + 18 : event.clientY - box.height - 12) + "px";
  }
  const hide = () => { tip.hidden = true; };

  function beside(item) {
    const box = item.getBoundingClientRect();
    tip.textContent = item.dataset.tip;
    place({ clientX: box.left, clientY: Math.min(box.bottom, innerHeight) - 10 });
  }

  for (const item of document.querySelectorAll("[data-tip]")) {
    item.addEventListener("pointermove", event => { tip.textContent = item.dataset.tip; place(event); });
    item.addEventListener("pointerleave", hide);
    item.addEventListener("focus", () => beside(item));
    item.addEventListener("blur", hide);
  }

  function nearest(xs, ys, x) {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    let best = -1;
    for (const at of [low - 2, low - 1, low, low + 1]) {
      if (at < 0 || at >= xs.length || ys[at] === null) continue;
      if (best < 0 || Math.abs(xs[at] - x) < Math.abs(xs[best] - x)) best = at;
    }
    return best;
  }

  function figures(value) {
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size !== 0 && size < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }

  function row(className, text) {
    const line = document.createElement("div");
    if (className) {
      const dot = document.createElement("i");
      dot.className = className;
      line.append(dot);
    }
    line.append(text);
    return line;
  }

  function chart(figure) {
    const holder = figure.querySelector("script[type='application/json']");
    if (!holder) return;
    const data = JSON.parse(holder.textContent);
    const svg = figure.querySelector("svg");
    const hidden = new Set();
    const [x0, x1] = data.scale, [left, top, right, bottom] = data.plot;
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", top);
    cross.setAttribute("y2", bottom);
    cross.style.display = "none";
    svg.append(cross);

    for (const key of figure.querySelectorAll(".key")) {
      key.addEventListener("click", () => {
        const off = key.getAttribute("aria-pressed") === "true";
        key.setAttribute("aria-pressed", String(!off));
        svg.querySelector(`.series[data-s="${key.dataset.s}"]`).classList.toggle("off", off);
        if (off) hidden.add(Number(key.dataset.s)); else hidden.delete(Number(key.dataset.s));
      });
    }

    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      if (at < left - 4 || at > right + 4) return leave();
      const x = x0 + (at - left) / (right - left) * (x1 - x0);
      const rows = [];
      let snapped = null;
      data.series.forEach((series, place) => {
        if (hidden.has(place)) return;
        const point = nearest(series.x, series.y, x);
        if (point < 0) return;
        const here = series.x[point];
        if (snapped === null || Math.abs(here - x) < Math.abs(snapped - x)) snapped = here;
        if (Math.abs(here - x) > (x1 - x0) * 0.2) return;
        rows.push(row(series.colour, `${series.label}: ${figures(series.y[point])}`));
      });
      if (snapped === null || !rows.length) return leave();
      const span = data.spans.find(([, start, end]) => snapped > start && snapped <= end) || data.spans[0];
      const pixel = left + (snapped - x0) / (x1 - x0) * (right - left);
      cross.setAttribute("x1", pixel);
      cross.setAttribute("x2", pixel);
      cross.style.display = "";
      tip.replaceChildren(row("", `${figures(snapped)} ${data.unit}${span ? ", " + span[0] : ""}`), ...rows);
      place(event);
    });
    function leave() { cross.style.display = "none"; hide(); }
    svg.addEventListener("pointerleave", leave);
  }

  document.querySelectorAll("figure.chart").forEach(chart);
  addEventListener("scroll", () => {  // reaching a mark by keyboard scrolls to it, and its tip stays
    const item = document.activeElement;
    if (item?.matches("[data-tip]:focus-visible")) beside(item); else hide();
  }, { passive: true });
})();
