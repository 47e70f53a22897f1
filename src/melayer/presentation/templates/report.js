"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 40rem)");

  // Text, grid and background follow the page, so that one figure serves light, dark and paper.
  function themed(layout, night) {
    const ink = night ? "#e7e9ec" : "#1c1e21";
    const line = night ? "#343a42" : "#d9dde2";
    const wash = night ? "#1d2127" : "#ffffff";
    const axis = (given) => Object.assign({ gridcolor: line, zerolinecolor: line, linecolor: line }, given);
    const result = Object.assign({
      font: { color: ink, family: "system-ui, sans-serif", size: 13 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow.matches ? 55 : 70, r: 15, t: 30, b: 50 },
      legend: { orientation: "h", x: 0, y: narrow.matches ? -0.35 : -0.24 },
      hoverlabel: { bgcolor: wash, font: { color: ink } },
    }, layout);
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(name)) result[name] = axis(layout[name]);
    }
    if (layout.scene) {
      result.scene = Object.assign({}, layout.scene);
      if (narrow.matches) {
        // The picture is as wide as the page: step back until it fits a phone.
        const eye = layout.scene.camera.eye;
        result.scene.camera = { center: layout.scene.camera.center, eye: { x: 1.7 * eye.x, y: 1.7 * eye.y, z: 1.7 * eye.z } };
      }
      for (const name of ["xaxis", "yaxis", "zaxis"]) result.scene[name] = axis(layout.scene[name]);
    }
    if (layout.updatemenus) {
      result.updatemenus = layout.updatemenus.map((menu) =>
        Object.assign({ bgcolor: wash, bordercolor: line, font: { color: ink } }, menu));
    }
    return result;
  }

  const options = { responsive: true, displaylogo: false, displayModeBar: "hover" };
  function draw(night) {
    return Promise.all(Object.entries(figures).map(([key, figure]) =>
      Plotly.react("plot-" + key, figure.data, themed(figure.layout, night), options)));
  }

  dark.addEventListener("change", () => draw(dark.matches));
  // On paper: light colours, and nothing folded away.
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((fold) => { fold.open = true; });
    draw(false);
  });
  window.addEventListener("afterprint", () => draw(dark.matches));
  draw(dark.matches).then(() => { document.body.dataset.drawn = "yes"; });
})();
