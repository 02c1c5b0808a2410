// Where teacher and student disagree: all tokens together, by place, by kind, by token.
lopd.showTokens = function (section) {
  const el = lopd.el;
  const sets = [];
  for (const run of lopd.data.runs) {
    for (const name of new Set(run.tokens.map((one) => one.set))) {
      const all = run.tokens.filter((one) => one.set === name);
      // The teacher does not deviate from itself, and says nothing but rounding.
      const others = all.filter((one) => one.model !== "teacher");
      const panels = others.length ? others : all;
      sets.push({ run, panels, title: panels[0].set_title });
    }
  }
  if (!sets.length) return false;
  section.append(el("p", {},
    "The deviation of a token is log \u03c0_teacher \u2212 log \u03c0_student in nats, where the " +
    "student is the model that wrote the response. Below 0 the teacher finds the token less " +
    "likely. On the frozen rollouts it is the advantage at the start of distill."));
  const holder = el("div");
  const several = lopd.data.runs.length > 1;
  const options = sets.map((set, index) =>
    [String(index), (several ? `${set.run.name}: ` : "") + set.title]);
  const { box, field } = lopd.select("Responses to", options, (value) => show(sets[value]));
  // What changed is more interesting than what was, where both are known.
  const first = Math.max(0, sets.findIndex((set) => set.panels.length > 1));
  box.value = String(first);
  section.append(el("div", { class: "controls" }, field), holder);
  show(sets[first]);
  return true;

  function show(set) {
    const already = lopd.charts.filter((chart) => !holder.contains(chart.plot));
    lopd.charts.splice(0, lopd.charts.length, ...already);
    const chart = lopd.chart({ title: "Mean absolute deviation along a response", unit: "nats",
      xTitle: "tenth of the response", lines: set.panels.map((panel, index) => ({
        name: panel.title, index, x: panel.positions.map((_, place) => place + 1),
        y: panel.positions.map((pair) => pair[1]) })) });
    const mean = lopd.chart({ title: "Mean deviation along a response", unit: "nats",
      xTitle: "tenth of the response", lines: set.panels.map((panel, index) => ({
        name: panel.title, index, x: panel.positions.map((_, place) => place + 1),
        y: panel.positions.map((pair) => pair[0]) })) });
    holder.replaceChildren(overall(set.panels), lopd.key(set.panels.map((panel) => panel.title)),
      el("div", { class: "charts" }, chart, mean), kinds(pairOf(set.panels)), tokens(pairOf(set.panels)));
    for (const one of lopd.charts) {
      if (holder.contains(one.plot) && one.plot.isConnected && one.plot.clientWidth) {
        one.drawn = true;
        one.draw();
      }
    }
  }

  function overall(panels) {
    const of = (name, digits) => ({ number: true, value: (row) => row.overall[name],
      text: (row) => lopd.fixed(row.overall[name], digits) });
    const share = (name, digits) => ({ number: true, value: (row) => row.overall[name],
      text: (row) => lopd.percent(row.overall[name], digits) });
    const quantiles = Object.keys(panels[0].overall.quantiles);
    return lopd.table("All tokens", [
      { title: "model", value: (row) => row.title },
      { title: "tokens", number: true, value: (row) => row.overall.tokens,
        text: (row) => lopd.count(row.overall.tokens) },
      { title: "mean", ...of("mean", 4) },
      { title: "mean size", ...of("mean_abs", 4) },
      { title: "beyond 1 nat", ...share("over_1", 2) },
      { title: "beyond 10 nats", ...share("over_clip", 3) },
      { title: "carried by the 1% largest", ...share("top_1_percent", 0) },
      ...quantiles.map((name) => ({ title: `${Number(name) * 100}% quantile`, number: true,
        value: (row) => row.overall.quantiles[name],
        text: (row) => lopd.fixed(row.overall.quantiles[name], 2) })),
    ], panels);
  }

  function kinds(panels) {
    const names = [...new Set(panels.flatMap((panel) => Object.keys(panel.kinds)))];
    const columns = [{ title: "kind of token", value: (row) => row }];
    for (const panel of panels) {
      const at = (row, index) => (panel.kinds[row] ? panel.kinds[row][index] : null);
      columns.push(
        { title: `${panel.title}: tokens`, number: true, value: (row) => at(row, 0),
          text: (row) => (at(row, 0) === null ? "" : lopd.count(at(row, 0))) },
        { title: "mean", number: true, value: (row) => at(row, 1),
          text: (row) => lopd.fixed(at(row, 1), 4) },
        { title: "share of the disagreement", number: true, value: (row) => at(row, 2),
          text: (row) => (at(row, 2) === null ? "" : lopd.percent(at(row, 2))) });
    }
    return lopd.table("By kind of token", columns, names, { sortable: true });
  }

  // Before and after, where both are known.
  function pairOf(panels) {
    const before = panels.find((panel) => panel.model === "sft") || panels[0];
    const after = panels.find((panel) => panel.model === "distilled");
    return after && after !== before ? [before, after] : [before];
  }

  function tokens(pair) {
    const total = pair.map((panel) => panel.overall.tokens);
    const rows = [...new Set(pair.flatMap((panel) => Object.keys(panel.tokens)))].map((id) => {
      const of = pair.map((panel) => panel.tokens[id] || null);
      const known = of.find((one) => one);
      const rates = of.map((one, index) => (one ? (1000 * one[1]) / total[index] : 0));
      return { id: Number(id), text: known[0], of, rates };
    });
    const columns = [
      { title: "token", value: (row) => row.text,
        text: (row) => el("code", {}, JSON.stringify(row.text)) },
      { title: "id", number: true, value: (row) => row.id },
    ];
    pair.forEach((panel, index) => columns.push(
      { title: `${panel.title}: per 1,000 tokens`, number: true,
        value: (row) => row.rates[index], text: (row) => lopd.fixed(row.rates[index], 2) },
      { title: "mean deviation", number: true,
        value: (row) => (row.of[index] ? row.of[index][2] : null),
        text: (row) => (row.of[index] ? lopd.signed(row.of[index][2], 3) : "") },
      { title: "share of the disagreement", number: true,
        value: (row) => (row.of[index] ? row.of[index][3] : 0),
        text: (row) => (row.of[index] ? lopd.percent(row.of[index][3]) : "") }));
    if (pair.length > 1) columns.push({ title: "change per 1,000 tokens", number: true,
      value: (row) => row.rates[1] - row.rates[0],
      text: (row) => lopd.signed(row.rates[1] - row.rates[0], 2) });
    rows.sort((one, other) => (other.of[0] ? other.of[0][3] : 0) - (one.of[0] ? one.of[0][3] : 0));
    const caption = "By token: the strongest and the commonest (a heading sorts by its column)";
    return el("details", { open: true }, el("summary", {}, "Single tokens"),
      lopd.table(caption, columns, rows, { sortable: true }));
  }
};
