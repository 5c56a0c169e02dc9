// The picture is drawn by Python; its colours beside those of the cells are the page's.

const { data, layout } = JSON.parse(document.getElementById("page").textContent);
const place = document.getElementById("picture");
const dark = matchMedia("(prefers-color-scheme: dark)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function draw() {
  const { width } = place.getBoundingClientRect();
  const clear = "rgba(0,0,0,0)";
  const font = { family: "system-ui, sans-serif", color: colour("quiet") };
  Plotly.react(place, data, { ...layout, width, font, paper_bgcolor: clear, plot_bgcolor: clear }, { displayModeBar: false });
}

draw();
addEventListener("resize", draw);
dark.addEventListener("change", draw);
