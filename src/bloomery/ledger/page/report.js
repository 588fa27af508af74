"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const settings = { responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false };
const narrow = window.matchMedia("(max-width: 600px)");
const draw = () => {
  for (const [id, chart] of Object.entries(charts)) {
    const shown = narrow.matches ? { ...chart, ...chart.narrow } : chart;
    Plotly.react(id, shown.data, shown.layout, settings);
  }
};
draw();
narrow.addEventListener("change", draw);
document.documentElement.dataset.charts = String(Object.keys(charts).length);
