"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const settings = { responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false };
for (const [id, chart] of Object.entries(charts)) {
  Plotly.newPlot(id, chart.data, chart.layout, settings);
}
document.documentElement.dataset.charts = String(Object.keys(charts).length);
