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
    "The ", lopd.term("deviation", "deviation"), " of a token is log \u03c0_teacher \u2212 log " +
    "\u03c0_student in ", lopd.term("nat", "nats"), ", where the student is the model that wrote " +
    "the response. Below 0 the teacher finds the token less likely. On the ",
    lopd.term("rollouts", "rollouts"), " it is the advantage at the start of distill."));
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
    const panels = shownPanels(set.panels);
    const pair = pairOf(set.panels);
    const places = panels[0].positions.map((_, place) => place + 1);
    const along = (title, x_title, x, y, name) => lopd.chart({ name, title, unit: "nats", x_title,
      lines: panels.map((panel, index) => ({ name: titleOf(panel, set.panels), index, x,
        y: y(panel) })) });
    const shares = lopd.data.quantiles;
    const percents = shares.map((share) => Math.round(100 * share));
    const charts = [
      along("Deviation by quantile", "% of the tokens are below", percents,
        (panel) => shares.map((share) => panel.overall.quantiles[share]), "deviations"),
      along("Mean size of the deviation along a response", "tenth of the response", places,
        (panel) => panel.positions.map((row) => row[1])),
      along("Mean deviation along a response", "tenth of the response", places,
        (panel) => panel.positions.map((row) => row[0])),
    ];
    if (panels.every((panel) => panel.entropy)) charts.push(
      along("Entropy of the teacher along a response", "tenth of the response", places,
        (panel) => panel.entropy.positions, "entropies"),
      along("Entropy of the teacher by quantile", "% of the tokens are below", percents,
        (panel) => shares.map((share) => panel.entropy.quantiles[share]), "entropies"));
    holder.replaceChildren(overall(panels, set.panels),
      lopd.key(panels.map((panel) => titleOf(panel, set.panels))),
      el("div", { class: "charts" }, charts), ...sureness(pair), kinds(pair), tokens(pair));
    for (const one of lopd.charts) {
      if (holder.contains(one.plot) && one.plot.isConnected && one.plot.clientWidth) {
        one.drawn = true;
        one.draw();
      }
    }
  }

  // A run of many refreshes has many panels. The first, the last and some between them are shown.
  function shownPanels(panels) {
    const most = 4;
    if (panels.length <= most) return panels;
    if (panels.some((panel) => panel.model === "distilled"))
      return panels.filter((panel) => panel.model !== "base").slice(0, most);
    return [...new Set([0, 1, 2, 3].map((part) =>
      panels[Math.round((part * (panels.length - 1)) / (most - 1))]))];
  }

  function titleOf(panel, panels) {
    const pair = pairOf(panels);
    const word = pair.length > 1 ? ["before: ", "after: "][pair.indexOf(panel)] || "" : "";
    return word + panel.title;
  }

  function overall(panels, all) {
    const of = (name, digits) => ({ number: true, value: (row) => row.overall[name],
      text: (row) => lopd.fixed(row.overall[name], digits) });
    const share = (name, digits) => ({ number: true, value: (row) => row.overall[name],
      text: (row) => lopd.percent(row.overall[name], digits) });
    const columns = [
      { title: "model", value: (row) => titleOf(row, all) },
      { title: "tokens", number: true, value: (row) => row.overall.tokens,
        text: (row) => lopd.count(row.overall.tokens) },
      { title: "mean", term: "deviation", ...of("mean", 4) },
      { title: "mean size", ...of("mean_abs", 4) },
      { title: "beyond 1 nat", term: "nat", ...share("over_1", 2) },
      { title: "beyond 10 nats", term: "clipped-share", ...share("over_clip", 3) },
      { title: "carried by the 1% largest", term: "disagreement", ...share("top_1_percent", 0) },
    ];
    if (panels.every((panel) => panel.entropy)) columns.push(
      { title: "entropy of the teacher", term: "entropy", number: true,
        value: (row) => row.entropy.mean, text: (row) => lopd.fixed(row.entropy.mean, 4) });
    return lopd.table("All tokens", columns, panels);
  }

  // Where the teacher is sure and where it is not, if the cache has its entropy.
  function sureness(pair) {
    if (!pair.every((panel) => panel.entropy)) return [];
    const names = [...new Set(pair.flatMap((panel) => panel.entropy.sizes.map((row) => row[0])))];
    const columns = [{ title: "entropy of the teacher, nats", term: "entropy",
      value: (row) => row }];
    for (const panel of pair) {
      const at = (row, index) => (panel.entropy.sizes.find((one) => one[0] === row) || [])[index]
        ?? null;
      columns.push(
        { title: `${titleOf(panel, pair)}: tokens`, number: true, value: (row) => at(row, 1),
          text: (row) => (at(row, 1) === null ? "" : lopd.count(at(row, 1))) },
        { title: "mean deviation", number: true, value: (row) => at(row, 2),
          text: (row) => (at(row, 2) === null ? "" : lopd.signed(at(row, 2), 4)) },
        { title: "share of the disagreement", term: "disagreement", number: true,
          value: (row) => at(row, 3),
          text: (row) => (at(row, 3) === null ? "" : lopd.percent(at(row, 3))) });
    }
    return [lopd.table("By how sure the teacher is", columns, names)];
  }

  function kinds(panels) {
    const names = [...new Set(panels.flatMap((panel) => Object.keys(panel.kinds)))];
    const columns = [{ title: "kind of token", value: (row) => row }];
    for (const panel of panels) {
      const at = (row, index) => (panel.kinds[row] ? panel.kinds[row][index] : null);
      columns.push(
        { title: `${titleOf(panel, panels)}: tokens`, number: true, value: (row) => at(row, 0),
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
    // Of rollouts that were refreshed, the newest ones are the last.
    const after = panels.find((panel) => panel.model === "distilled") ||
      (before.set === "rollouts" ? panels[panels.length - 1] : undefined);
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
      { title: `${titleOf(panel, pair)}: per 1,000 tokens`, number: true,
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
    // As a list of rows it is long.
    const open = matchMedia("(min-width: 45rem)").matches;
    return el("details", { open }, el("summary", {}, "Single tokens"),
      lopd.table(caption, columns, rows, { sortable: true }));
  }
};
