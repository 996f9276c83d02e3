"use strict";

const figures = JSON.parse(document.getElementById("figures").textContent);
const charts = [...document.querySelectorAll(".chart")];
const hidden = new Set(); // legend entries that were switched off
let axis = "step";
let range = null; // of the axis, shared by all charts; the whole run without it
let linking = false;
let printing = false;

// plotly comes compressed in the page, whose policy admits its text and no other.
async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = text;
  document.head.append(script);
  if (!window.Plotly) throw new Error("it was not admitted");
}

const placesOf = (trace) => (axis === "step" ? trace.x : trace.meta[axis]);

function coloursOf(chart) {
  const style = getComputedStyle(chart);
  const card = getComputedStyle(chart.parentElement);
  return { ink: style.color, grid: style.borderTopColor, muted: style.outlineColor, surface: card.backgroundColor, edge: card.borderTopColor };
}

// The same stretch of the axis in all charts, whatever their curves cover.
function wholeRange() {
  let [least, most] = [Infinity, -Infinity];
  for (const place of figures.flatMap((figure) => figure.data.flatMap(placesOf))) {
    least = Math.min(least, place);
    most = Math.max(most, place);
  }
  const margin = (most - least) * 0.012 || 0.5;
  return [least - margin, most + margin];
}

// Where something happened: a line through every chart.
function eventLines() {
  const marked = figures[0].data.filter((trace) => trace.meta.mark && !hidden.has(trace.legendgroup));
  return marked.flatMap((trace) =>
    placesOf(trace).map((x) => ({
      type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, layer: "below", opacity: 0.6,
      line: { color: trace.marker.color, width: 1, dash: "dot" },
    })),
  );
}

function layoutOf(figure, colours) {
  const { axes } = figure.layout.meta;
  const both = { zeroline: false, automargin: true, tickfont: { color: colours.muted } };
  return {
    ...figure.layout,
    ...(printing ? { width: 660 } : {}),
    title: undefined, // is in the page
    showlegend: false,
    paper_bgcolor: colours.surface,
    plot_bgcolor: colours.surface,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.ink },
    margin: { l: 44, r: 16, t: 12, b: 36 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colours.surface, bordercolor: colours.edge, font: { color: colours.ink } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.muted, activecolor: colours.ink },
    xaxis: {
      ...both,
      range: [...(range ?? wholeRange())],
      showgrid: false, showline: true, linecolor: colours.edge, ticks: "outside", tickcolor: colours.edge, nticks: 8,
      spikecolor: colours.muted, spikethickness: 1, spikedash: "solid",
      title: { text: axes[axis], standoff: 6, font: { size: 11, color: colours.muted } },
      hoverformat: axis === "step" || axis === "tokens" ? ",d" : ".3~f",
      unifiedhovertitle: { text: axis === "time" ? `%{x} ${axes.time}` : `${axes[axis]} %{x}` },
    },
    yaxis: { ...both, ...figure.layout.yaxis, gridcolor: colours.grid, nticks: 6 },
    shapes: [...figure.layout.shapes, ...eventLines()],
  };
}

function draw() {
  charts.forEach((chart, place) => {
    const figure = figures[place];
    const traces = figure.data.map((trace) => ({
      ...trace, x: placesOf(trace), visible: !hidden.has(trace.legendgroup),
    }));
    Plotly.react(chart, traces, layoutOf(figure, coloursOf(chart)), {
      responsive: !printing,
      doubleClick: "reset",
      displaylogo: false,
      modeBarButtons: [["toImage"]],
      toImageButtonOptions: { filename: `${document.title} ${figure.layout.title.text}` },
    });
  });
}

// A zoom in one chart is a zoom in all.
async function zoom(newRange) {
  if (linking) return;
  linking = true;
  range = newRange;
  const change = range ? { "xaxis.range": [...range] } : { "xaxis.range": wholeRange(), "yaxis.autorange": true };
  await Promise.all(charts.map((chart) => Plotly.relayout(chart, change)));
  linking = false;
}

function onRelayout(change) {
  if ("xaxis.range[0]" in change) zoom([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
  else if (change["xaxis.autorange"]) zoom(null);
}

function toggle(button) {
  const name = button.dataset.group;
  const shown = hidden.delete(name);
  if (!shown) hidden.add(name);
  button.setAttribute("aria-pressed", shown);
  draw();
}

async function startCurves() {
  const message = document.getElementById("no-curves");
  if (!figures.length) return;
  if (!window.DecompressionStream) {
    message.textContent = "This browser is too old to unpack the curves; any of 2023 or later shows them.";
    return;
  }
  try {
    await loadPlotly();
  } catch (error) {
    message.textContent = `The curves could not be unpacked (${error.message}).`;
    return;
  }
  message.remove();
  draw();
  charts.forEach((chart) => chart.on("plotly_relayout", onRelayout));
  document.getElementById("whole").addEventListener("click", () => zoom(null));
  for (const button of document.querySelectorAll("[data-group]")) button.addEventListener("click", () => toggle(button));
  for (const choice of document.querySelectorAll("[name=axis]")) {
    choice.addEventListener("change", () => {
      axis = choice.value;
      range = null;
      draw();
    });
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", draw);
  document.getElementById("theme").addEventListener("click", draw);
  const print = (begins) => {
    printing = begins;
    draw();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  document.documentElement.dataset.curves = "drawn";
}

function startPage() {
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = getComputedStyle(document.body).colorScheme === "dark" ||
      (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = isDark ? "light" : "dark";
  });
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const flags = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(flags.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(flags); // may not write there: at least it is marked
      }
    });
  }
  let theme;
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    theme = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
  });
  addEventListener("afterprint", () => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  });
}

startPage();
startCurves();
