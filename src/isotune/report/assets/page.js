"use strict";
(() => {
  const root = document.documentElement;
  const plots = JSON.parse(document.getElementById("isotune-plots").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const spoken = document.getElementById("spoken");
  let printing = false;

  // Themes: the figures name colours, and get those that the page's style has at the moment.
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);

  function colours() {
    const style = getComputedStyle(root);
    return (name) => style.getPropertyValue(`--${name}`).trim();
  }

  function coloured(value, colour) {
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((own) => coloured(own, colour));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, own]) => [key, coloured(own, colour)]));
    }
    if (typeof value !== "string" || value[0] !== "@") return value;
    if (value === "@scale") return [[0, colour("low")], [0.5, colour("middle")], [1, colour("high")]];
    const [name, opacity] = value.slice(1).split("/");
    const found = colour(/^\d$/.test(name) ? `c${name}` : name);
    return opacity ? found + Math.round(2.55 * opacity).toString(16).padStart(2, "0") : found;
  }

  function themed(plot, width) {
    const colour = colours();
    const { data, layout } = coloured(plot, colour);
    const axis = (own) => ({
      gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"), tickcolor: colour("line"),
      automargin: true, ...own, title: { standoff: 12, ...own?.title },
    });
    return [data, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, size: width < 480 ? 11 : 12.5, color: colour("ink") },
      margin: { l: 48, r: 14, t: 26, b: 44 },
      legend: { orientation: "h", x: 0, y: -0.2, yanchor: "top", yref: "paper" },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("muted"), font: { color: colour("ink") } },
      colorway: [colour("c1")], ...layout, width, height: tall(data, layout, width),
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    }];
  }

  // A legend beneath takes more lines the narrower the page is; the height grows by as many.
  function tall(data, layout, width) {
    const named = layout.showlegend === false ? [] : data.filter((t) => t.name && t.showlegend !== false && t.type !== "heatmap");
    if (named.length < 2) return layout.height;
    const widest = Math.max(...named.map((t) => t.name.length)) * 7.5 + 55;
    return layout.height + 20 * (Math.ceil(named.length / Math.max(1, Math.floor((width - 70) / widest))) - 1);
  }

  const config = {
    displaylogo: false, responsive: false, showTips: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };

  const state = (width) => `${width} ${isDark() ? "dark" : "light"}`;

  function draw(figure) {
    const own = plots[figure.dataset.plot];
    const chosen = figure.querySelector(".choose select")?.value ?? Object.keys(own)[0];
    const place = figure.querySelector(".plot");
    const width = printing ? 660 : place.clientWidth;
    if (!width || !own[chosen]) return;
    const [data, layout] = themed(own[chosen], width);
    Plotly.react(place, data, layout, config);
    place.style.minHeight = "";
    figure.dataset.drawn = state(width);
  }

  const figures = [...document.querySelectorAll("figure[data-plot]")].filter((figure) => figure.querySelector(".plot"));

  // Only what is about to be seen is drawn: a page of many figures opens, and changes, as fast as one of few.
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      if (target.dataset.drawn !== state(target.querySelector(".plot").clientWidth)) draw(target);
    }
  }, { rootMargin: "400px" });

  function refresh() {
    for (const figure of figures) {
      seen.unobserve(figure);
      seen.observe(figure);
    }
  }

  async function unpacked() {
    const packed = document.getElementById("plotly-gz").textContent;
    const bytes = Uint8Array.fromBase64?.(packed) ?? Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  async function start() {
    if (!figures.length) return;
    for (const figure of figures) figure.querySelector(".plot").style.minHeight = `${figure.dataset.height}px`;
    await unpacked();
    let waiting;
    new ResizeObserver(() => {
      clearTimeout(waiting);
      waiting = setTimeout(() => printing || refresh(), 120);
    }).observe(document.body);
    let theme;
    addEventListener("beforeprint", () => {
      if (!printing) theme = root.dataset.theme;
      printing = true;
      retheme("light");
      figures.forEach(draw);
    });
    addEventListener("afterprint", () => {
      printing = false;
      retheme(theme);
      refresh();
    });
    refresh();
    root.dataset.ready = "yes";
  }

  // One choice for figures that stand side by side, where they all have it.
  for (const select of document.querySelectorAll(".choose select")) {
    select.addEventListener("change", () => {
      for (const other of select.closest(".figures").querySelectorAll(".choose select")) {
        if (other !== select && [...other.options].some((option) => option.value === select.value)) other.value = select.value;
        const figure = other.closest("figure");
        if (figure.dataset.drawn) draw(figure);
      }
    });
  }

  const button = document.getElementById("theme");

  function retheme(theme) {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    button.textContent = isDark() ? "Light theme" : "Dark theme";
  }

  button.hidden = false;
  retheme(root.dataset.theme);
  button.addEventListener("click", () => {
    retheme(isDark() ? "light" : "dark");
    try { localStorage.setItem("isotune-theme", root.dataset.theme); } catch {}
    refresh();
  });
  dark.addEventListener("change", () => { retheme(root.dataset.theme); refresh(); });

  // Tables: a button in each header; what is unknown stays at the end either way.
  const key = (cell) => cell.dataset.v ?? cell.textContent.trim().toLowerCase();

  function sort(table, index, header) {
    const numeric = header.classList.contains("num");
    const was = header.getAttribute("aria-sort");
    const down = was ? was === "ascending" : numeric;
    for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row.cells[index]), row]);
    const compare = numeric ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
    rows.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : (down ? -1 : 1) * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
    spoken.textContent = `${table.caption.textContent}: sorted by ${header.textContent}, ${down ? "descending" : "ascending"}`;
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    if (table.tBodies[0].rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((header, index) => {
      if (!header.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      button.addEventListener("click", () => sort(table, index, header));
    });
  }

  // The section that is being read is marked in the navigation.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const reading = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70%" });
  for (const section of document.querySelectorAll("main > section")) reading.observe(section);

  // The verdict is on the screen before the figures' library is unpacked.
  (self.requestIdleCallback ?? setTimeout)(start, { timeout: 500 });
})();
