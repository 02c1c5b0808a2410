// The curves of all runs, the lengths of answers, and the knobs in which the runs differ.
lopd.showCurves = function (section) {
  const { charts, runs, knobs, quantiles } = lopd.data;
  const el = lopd.el;
  const several = runs.length > 1;
  const lengths = lengthChart();
  if (!charts.length && !lengths) return false;
  if (several) section.append(lopd.key(runs.map((run) => run.name)));
  runs.forEach((run) => {
    if (run.refreshes?.length) section.append(refreshed(run));
  });
  const figures = (group) => charts.filter((one) => one.group === group).map((one) =>
    lopd.chart(one.series.length ? stepChart(one) : modelChart(one)));
  section.append(el("div", { class: "charts" }, figures("main"),
    lengths ? lopd.chart(lengths) : []));
  const more = figures("more");
  if (more.length) {
    section.append(el("details", {}, el("summary", {}, `${more.length} more curves`),
      el("div", { class: "charts" }, more)));
  }
  section.append(el("p", { class: "muted" },
    "The reverse KL of a step is measured on frozen rollouts, and that of the overview on fresh " +
    "responses to held-out prompts. They are of other prompts and may differ many times over."));
  if (knobs.length) {
    const columns = [{ title: "knob", value: (row) => row[0], text: (row) =>
      el("code", {}, row[0]) }];
    runs.forEach((run, index) => columns.push({ title: run.name, value: (row) =>
      String(row[index + 1]) }));
    section.append(el("details", { class: "knobs" },
      el("summary", {}, `The runs differ in ${knobs.length} knob${knobs.length === 1 ? "" : "s"}`),
      lopd.table("Knobs in which the runs differ", columns, knobs)));
  } else if (several) {
    section.append(el("p", {}, "No recorded knob differs between these runs."));
  }
  return true;

  // One line for each refresh. The charts of distill have a dotted line at its step.
  function refreshed(run) {
    const took = (seconds) => (seconds === null ? "" : `, the teacher took ${lopd.count(
      Math.round(10 * seconds) / 10)} s`);
    return el("div", {}, el("p", {}, several ? `${run.name}: ` : "",
      lopd.term("refresh", "refreshes"), " (dotted lines in the charts):"),
      el("ul", { class: "refreshes" }, run.refreshes.map((one) => el("li", {},
        `after step ${one.step}: ${lopd.count(one.responses)} responses, ` +
        `${lopd.count(one.tokens)} tokens scored${took(one.seconds)}`))));
  }

  function marks(one) {
    if (one.stage !== "distill") return [];
    return runs.flatMap((run, index) =>
      (run.refreshes || []).map(({ step }) => ({ step, index })));
  }

  function stepChart(one) {
    const name = (line) => (line.label && !several ? line.label
      : [runs[line.source].name, line.label].filter((part) => part).join(": "));
    // Quantiles need lines of their own.
    const key = one.series.some((line) => line.label);
    const lines = one.series.map((line, place) =>
      ({ ...line, index: key ? place : line.source, name: name(line) }));
    return { ...one, lines, key, note: levels(one), marks: marks(one) };
  }

  // What the models came to that were evaluated at the end, in words.
  function levels(one) {
    if (several || !one.levels.length) return "";
    const { n } = one.levels[0];
    const of = one.unit === "%" ? "%" : ` ${one.unit}`;
    return `At the end${n ? `, on ${lopd.count(n)} held-out prompts` : ""}: ` +
      `${one.levels.map((level) => `${level.title} ${lopd.short(level.value)}${of}`).join(", ")}.`;
  }

  // The models that were evaluated at the end, side by side.
  function modelChart(one) {
    const models = [...new Set(one.levels.map((level) => level.model))];
    const short = { base: "base", sft: "SFT", sft_longer: "SFT of\nequal compute",
      distilled: "distilled", teacher: "teacher" };
    const lines = runs.flatMap((run, index) => {
      const own = one.levels.filter((level) => level.source === index);
      if (!own.length) return [];
      const line = { name: run.name, index, x: own.map((level) => models.indexOf(level.model)),
        y: own.map((level) => level.value) };
      if (own.every((level) => level.high !== undefined)) Object.assign(line, {
        band: "95% interval", low: own.map((level) => level.low || null),
        high: own.map((level) => level.high) });
      return [line];
    });
    return { ...one, x_title: "model", names: models.map((model) => short[model]), lines,
      note: runs.filter((run) => run.overview.outdated).map((run) =>
        `${run.name}: the evaluation is of ${run.overview.outdated}.`).join(" ") };
  }

  // Before and after of one run; of several runs the models that they are judged by.
  function lengthChart() {
    const lines = runs.flatMap((run) => {
      const models = run.overview.models.filter((model) => model.name !== "base");
      const finals = models.filter((model) => ["distilled", "model"].includes(model.name));
      return (several ? finals : models).map((model) => ({
        name: several ? `${run.name}: ${model.title}` : model.title,
        x: quantiles.map((share) => Math.round(100 * share)), y: model.length_quantiles }));
    }).filter((line) => line.y.length);
    if (!lines.length) return null;
    lines.forEach((line, index) => { line.index = index; });
    return { name: "lengths", title: "Length of answers to held-out prompts, by quantile",
      unit: "tokens", x_title: "% of the answers are shorter", lines, key: true,
      note: several ? "" : lines.map((line) =>
        `${line.name}: median ${lopd.short(line.y[quantiles.indexOf(0.5)])}`).join("; ") };
  }
};
