// Lines of the last hour as SVG. Everything is made by calls of the DOM, and no text becomes markup.

export const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
};

const drawn = (name, attributes = {}) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

const [WIDTH, HEIGHT, INTERVAL] = [600, 120, 10];

// Seconds that a chart shows: what there is, from ten minutes to an hour.
const [SHORTEST, LONGEST] = [600, 3600];

// A chart of up to five lines. `format` writes a value, `lines` names the columns.
export function chart(title, lines, format) {
  const legend = element("ul", { className: "legend" });
  const values = lines.map((name, i) => {
    const value = element("b", { textContent: "–" });
    const swatch = drawn("svg", { viewBox: "0 0 24 8", "aria-hidden": "true" });
    swatch.append(drawn("path", { d: "M1 4H23", class: `s${i + 1}` }));
    legend.append(element("li", {}, swatch, `${name} `, value));
    return value;
  });
  const plot = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  const most = element("span", { className: "most" });
  const when = element("span", { textContent: "an hour ago" });
  const axis = element("div", { className: "axis", ariaHidden: "true" }, when, element("span", { textContent: "now" }));
  const figure = element("figure", { className: "chart" }, element("figcaption", { textContent: title }), legend, element("div", { className: "plot" }, plot, most), axis);
  let shown = { at: [], columns: [], now: 0, span: LONGEST };

  const tell = (i) => values.forEach((value, n) => {
    const one = shown.columns[n]?.[i];
    value.textContent = one === null || one === undefined ? "–" : format(one);
  });
  const since = () => (shown.span === LONGEST ? "an hour ago" : `${Math.round(shown.span / 60)} min ago`);
  const place = (at) => WIDTH * (1 - (shown.now - at) / shown.span);

  function update(at, columns, now, away = []) {
    shown = { at, columns, now, span: Math.min(LONGEST, Math.max(SHORTEST, now - (at[0] ?? now))) };
    when.textContent = since();
    const known = columns.flat().filter((value) => value !== null);
    const top = format === bytes ? niceBytes(Math.max(...known, 0)) : nice(Math.max(...known, 0));
    const height = (value) => HEIGHT - 3 - (value / top) * (HEIGHT - 8);
    plot.replaceChildren();
    away.forEach((isWhole, i) => {
      const width = WIDTH * INTERVAL / shown.span;
      if (!isWhole) plot.append(drawn("rect", { class: "away", x: place(at[i]) - width, y: 0, width, height: HEIGHT }));
    });
    columns.forEach((column, n) => {
      let [d, isOpen] = ["", false];
      column.forEach((value, i) => {
        if (value === null) { isOpen = false; return; }
        const point = `${place(at[i]).toFixed(1)} ${height(value).toFixed(1)}`;
        const isAlone = !isOpen && (i + 1 === column.length || column[i + 1] === null);
        d += isOpen ? `L${point}` : `M${point}${isAlone ? "h.01" : ""}`;
        isOpen = true;
      });
      plot.append(drawn("path", { d, class: `s${n + 1}` }));
    });
    most.textContent = format(top);
    tell(at.length - 1);
    const spoken = lines.map((name, n) => `${name}: now ${values[n].textContent}`);
    plot.setAttribute("aria-label", `${title}. ${spoken.join(", ")}. Highest mark ${format(top)}.`);
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = shown.now - shown.span * (1 - (event.clientX - box.left) / box.width);
    const i = shown.at.reduce((best, at, n) => (Math.abs(at - wanted) < Math.abs(shown.at[best] - wanted) ? n : best), 0);
    if (shown.at.length === 0) return;
    plot.querySelector("line")?.remove();
    plot.append(drawn("line", { class: "at", x1: place(shown.at[i]), x2: place(shown.at[i]), y1: 0, y2: HEIGHT }));
    when.textContent = new Date(shown.at[i] * 1000).toLocaleTimeString();
    tell(i);
  });
  plot.addEventListener("pointerleave", () => {
    plot.querySelector("line")?.remove();
    when.textContent = since();
    tell(shown.at.length - 1);
  });
  return { figure, update };
}

// The next larger of 1, 2 and 5 times a power of ten.
function nice(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function niceBytes(value) {
  const unit = 1024 ** Math.max(0, Math.floor(Math.log2(Math.max(value, 1)) / 10));
  return nice(value / unit) * unit;
}

export const number = (value) => (value >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(3)).toString());

export const rate = (value) => `${number(value)}/s`;

export const milliseconds = (value) => `${number(value)} ms`;

export function bytes(value) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (value < 1024) return `${number(value)} ${unit}`;
    value /= 1024;
  }
  return `${number(value)} GiB`;
}
