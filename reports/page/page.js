"use strict";
(() => {
  // Okabe and Ito's colours, in the order of the modes; lighter ones on a dark ground.
  const COLOURS = {
    light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4BC8", "#D3D9DF"],
    dark: ["#58AEE3", "#F28C50", "#3CC79B", "#E2A3C6", "#F0B840", "#A5DAF7", "#B79AF5", "#46505B"],
  };
  // In the order of the kinds of plans; the full model is as dark as text, other plans are grey.
  const KINDS = {
    light: ["#0072B2", "#D55E00", "#009E73", "#C0649A", "#1A2027", "#7D8792", "#A87200", "#2E9CCF", "#7A4BC8", "#C4182F",
      "#5F7D00", "#8C5A2B"],
    dark: ["#58AEE3", "#F28C50", "#3CC79B", "#E2A3C6", "#E4E9EE", "#8E99A5", "#F0B840", "#A5DAF7", "#B79AF5", "#FF6B78",
      "#B5D64A", "#D2A679"],
  };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const charts = JSON.parse(document.getElementById("charts").textContent);
  let views = [];

  function theme() {
    const scheme = dark.matches ? "dark" : "light";
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
    const text = { labelColor: soft, titleColor: ink, titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 12 };
    return {
      background: "transparent",
      font: 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif',
      axis: { ...text, gridColor: line, domainColor: soft, tickColor: soft, gridOpacity: 0.7 },
      legend: { ...text, labelLimit: 260 },
      title: { color: ink },
      text: { color: ink },
      rule: { color: soft },
      view: { stroke: null },
      range: { category: COLOURS[scheme], ordinal: KINDS[scheme], heatmap: { scheme: "viridis" } },
    };
  }

  function forbid() {
    return Promise.reject(new Error("this page loads nothing"));
  }

  // Names of points are placed where they cover no other, or left out, for the width that the chart has.
  function patch(spec) {
    for (const mark of spec.marks.filter(({ name }) => name === "names_marks")) {
      const anchor = ["top-right", "top-left", "bottom-right", "bottom-left", "top", "bottom"];
      const size = { signal: "[width, height]" };
      mark.transform = [{ type: "label", size, anchor, offset: [7], avoidMarks: ["points_marks"] }];
    }
    return spec;
  }

  async function draw() {
    views.forEach((view) => view.finalize());
    views = [];
    const config = theme();
    for (const place of document.querySelectorAll("[data-chart]")) {
      const { spec, renderer } = charts[place.dataset.chart];
      const loader = { load: forbid, sanitize: forbid, http: forbid, file: forbid };
      // The interpreter (ast) needs no eval, which the page's policy forbids.
      const options = { ast: true, actions: false, defaultStyle: false, renderer, config, loader, patch,
        tooltip: { disableDefaultStyle: true } };
      views.push(await window.vegaEmbed(place, spec, options));
    }
    document.documentElement.dataset.drawn = Math.round(performance.now());
  }

  function key(cell) {
    return cell.dataset.v ?? cell.textContent;
  }

  function compare(a, b) {
    if (a === "" || b === "") return (a === "") - (b === "");
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  }

  function sort(head) {
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = Array.from(body.rows, (row) => [key(row.cells[column]), row]);
    // Empty cells stay last in both directions.
    keyed.sort(([a], [b]) => (a === "" || b === "" || !down ? compare(a, b) : compare(b, a)));
    body.append(...keyed.map(([, row]) => row));
  }

  for (const button of document.querySelectorAll("table.sortable th button")) {
    button.addEventListener("click", () => sort(button.parentNode));
  }
  dark.addEventListener("change", draw);
  draw();
})();
