// The first screen: results, warnings, who taught whom, what it cost.
lopd.showOverview = function (section) {
  const el = lopd.el;
  const { runs, comparisons, knobs } = lopd.data;
  if (comparisons.length) {
    section.append(el("h3", {}, "Which run is better"),
      el("ul", {}, comparisons.map((one) => el("li", {}, one.text))));
  }
  if (runs.length > 1 && !comparisons.length) {
    section.append(el("p", {}, "These runs have no judged answers to the same held-out prompts, " +
      "so the page cannot say which one is better."));
  }
  // The second question of everybody: what was done differently.
  if (knobs.length) {
    section.append(el("h3", {}, `Knobs that differ (${runs.map((run) => run.name).join(" / ")})`),
      el("ul", { class: "differing" }, knobs.map(([name, ...values]) => el("li", {},
        el("code", {}, name), `: ${values.map((one) => (one === "" ? "absent"
          : String(one))).join(" / ")}`))));
  }
  section.append(el("div", { class: "cards" }, runs.map((run) => card(run))));
  return true;

  function card(run) {
    const { overview } = run;
    const warnings = run.checks.filter((check) => check.state !== "fine");
    const fine = run.checks.filter((check) => check.state === "fine");
    const count = (state) => run.checks.filter((check) => check.state === state).length;
    const some = (number, word) => `${number || "No"} ${word}${number === 1 ? "" : "s"}`;
    const said = some(count("warning"), "warning") +
      (count("note") ? `, ${some(count("note"), "note")}` : "");
    return el("article", { class: "card", "aria-label": run.name },
      el("h3", {}, run.name),
      el("p", { class: "headline" }, overview.headline),
      overview.further.map((sentence) => el("p", {}, sentence)),
      run.checks.length ? el("h4", {}, said) : null,
      warnings.length ? el("ul", { class: "checks" }, warnings.map(line)) : null,
      fine.length ? el("details", {},
        el("summary", {}, `${fine.length} check${fine.length === 1 ? "" : "s"} passed`),
        el("ul", { class: "checks" }, fine.map(line))) : null,
      overview.models.length ? models(overview.models, run) : null,
      el("h4", {}, "What it is"), pairs(overview.about),
      overview.cost.length ? [el("h4", {}, "What it cost"), pairs(overview.cost)] : null);
  }

  function line(check) {
    const words = { warning: "Warning: ", note: "Note: ", fine: "" };
    const terms = { "equal compute": "equal-compute", "distance to the teacher": "reverse-kl",
      "drift from the rollouts": "effective-sample-share", "clipped share": "clipped-share",
      "gap of the gradient": "chi-square",
      "mean advantage": "deviation", "advantage of end tokens": "deviation",
      "sharp teacher": "disagreement", "end token": "cut-off" };
    const title = check.title in terms ? lopd.term(terms[check.title], check.title) : check.title;
    return el("li", { class: check.state },
      el("span", { class: "word" }, words[check.state]), title, `. ${check.text} `,
      check.remedy ? `What to do: ${check.remedy} ` : null,
      check.state !== "fine" && check.doc ? lopd.doc(check.doc) : null);
  }

  function pairs(rows) {
    return el("dl", {}, rows.flatMap(([title, text]) =>
      [el("dt", {}, title), el("dd", {}, text)]));
  }

  // The teacher's divergence from itself is rounding.
  function divergence(pair) {
    if (!pair) return "";
    if (Math.abs(pair[0]) < 1e-7) return "0";
    return `${lopd.short(pair[0])} \u00b1 ${pair[1] === null ? "?" : pair[1].toPrecision(1)}`;
  }

  function models(rows, run) {
    const has = (name) => rows.some((row) => row[name]);
    const places = { sft: " (before)", distilled: " (after)" };
    const columns = [{ title: "model", term: "student",
      value: (row) => row.title + (run.overview.kind === "run" ? places[row.name] || "" : "") }];
    if (has("accuracy")) columns.push({ title: "accuracy, % (95%)", number: true, term: "interval",
      value: (row) => row.accuracy ? row.accuracy[0] : null,
      text: (row) => row.accuracy ? `${(100 * row.accuracy[0]).toFixed(1)} ` +
        `(${(100 * row.accuracy[1]).toFixed(1)}\u2013${(100 * row.accuracy[2]).toFixed(1)})`
        : "" });
    if (has("reverse_kl")) columns.push({ title: "reverse KL, nats per token",
      number: true, term: "reverse-kl", value: (row) => row.reverse_kl ? row.reverse_kl[0] : null,
      text: (row) => divergence(row.reverse_kl) });
    columns.push(
      { title: "tokens: mean (10%, median, 90%, max)", number: true,
        value: (row) => row.mean_len,
        text: (row) => `${row.mean_len.toFixed(1)} (${row.lengths.map(Math.round).join(", ")})` },
      { title: "cut off", number: true, term: "cut-off",
        value: (row) => (row.finish.length || 0) / row.responses,
        text: (row) => lopd.percent((row.finish.length || 0) / row.responses) });
    const { prompts, responses } = rows[0];
    return lopd.table(`Answers to ${lopd.count(prompts)} prompts ` +
      `(${lopd.count(responses)} responses of each model)` + (run.overview.outdated
      ? `. Outdated: of ${run.overview.outdated}.` : ""), columns, rows);
  }
};
