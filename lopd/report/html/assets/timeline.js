// The pipeline: stages with their artifacts, a Gantt chart, and where the time went.
lopd.showPipeline = function (section) {
  const el = lopd.el;
  const kinds = { "server start": "start of a server", step: "training step",
    sync: "sync and held-out answers", refresh: "refresh: new rollouts and scores",
    "between steps": "other time between steps (checkpoints, pauses)", stage: "other work" };
  // What a stage does besides, for which its logs have no moments of their own.
  const rests = { demonstrate: "the teacher samples; reading of prompts",
    sft: "start of the ranks, loading and export of weights, checkpoints",
    rollout: "the SFT student samples; reading of prompts",
    score: "the teacher scores; reading and writing of the cache",
    distill: "start of the ranks, loading and export of weights, checkpoints",
    evaluate: "the models answer, the teacher scores, answers are judged",
    export: "copying of the model" };
  let shown = false;
  for (const run of lopd.data.runs) {
    if (!run.overview.stages.length) continue;
    shown = true;
    if (lopd.data.runs.length > 1) section.append(el("h3", {}, run.name));
    section.append(stages(run), lineage(run));
    if (run.timeline.length) section.append(times(run), gantt(run));
  }
  return shown;

  function stages(run) {
    const columns = [
      { title: "stage", value: (row) => row.name },
      { title: "state", value: (row) => row.state },
      { title: "last command", term: "reused", value: (row) => row.last_command },
      { title: "time", number: true, value: (row) => row.seconds,
        text: (row) => lopd.duration(row.seconds) },
      { title: "processes or GPUs", number: true, value: (row) => row.devices,
        text: (row) => `${row.devices} (${row.device})` },
      { title: "hours of them", number: true,
        value: (row) => (row.seconds === null ? null : (row.seconds * row.devices) / 3600),
        text: (row) => (row.seconds === null ? ""
          : lopd.fixed((row.seconds * row.devices) / 3600, 3)) },
      { title: "rows", number: true, value: (row) => row.rows,
        text: (row) => (row.rows ? lopd.count(row.rows) : "") },
      { title: "tokens", number: true, value: (row) => row.tokens,
        text: (row) => (row.tokens ? lopd.count(row.tokens) : "") },
    ];
    return lopd.table("Stages, with the time of the command that finished each", columns,
      run.overview.stages);
  }

  function lineage(run) {
    const told = (pairs) =>
      Object.entries(pairs).map(([name, text]) => `${name}: ${text}`).join("; ");
    const columns = [
      { title: "stage", value: (row) => row.name },
      { title: "with the models (weights)", term: "fingerprint",
        value: (row) => told(row.models) },
      { title: "from the artifacts", value: (row) => told(row.parents) },
      { title: "it gave", value: (row) => row.gave },
      { title: "fingerprint", term: "fingerprint", value: (row) => row.fingerprint,
        text: (row) => el("code", {}, row.fingerprint) },
    ];
    return lopd.table("Which model made what, and from what", columns, run.overview.stages);
  }

  // Seconds by kind. What is within a stage and of no other kind is the rest. Servers start side by
  // side, so what overlaps counts once.
  function sums(spans) {
    const lanes = new Map();
    for (const span of spans) {
      const lane = lanes.get(span.lane) || { stage: 0, ends: {} };
      lanes.set(span.lane, lane);
      const end = Math.max(span.start, lane.ends[span.kind] || 0);
      lane[span.kind] = (lane[span.kind] || 0) + Math.max(0, span.end - end);
      lane.ends[span.kind] = Math.max(end, span.end);
    }
    return [...lanes].map(([name, lane]) => {
      const inner = Object.keys(kinds).filter((kind) => kind !== "stage")
        .reduce((sum, kind) => sum + (lane[kind] || 0), 0);
      return { name, total: lane.stage, ...lane, stage: Math.max(0, lane.stage - inner) };
    });
  }

  function times(run) {
    const rows = sums(run.timeline);
    const all = rows.reduce((sum, row) => sum + row.total, 0);
    const used = Object.keys(kinds).filter((kind) => rows.some((row) => row[kind] >= 0.5));
    const columns = [
      { title: "stage", value: (row) => row.name },
      { title: "time", number: true, value: (row) => row.total,
        text: (row) => `${lopd.duration(row.total)} (${lopd.percent(row.total / all, 0)})` },
      ...used.map((kind) => ({ title: kinds[kind], number: true, value: (row) => row[kind] || 0,
        text: (row) => (row[kind] >= 0.5 ? lopd.duration(row[kind]) : "") })),
      { title: "what the other work is", value: (row) => rests[row.name] || "" },
    ];
    return lopd.table("Where the time went, by the logs (all commands together)", columns, rows);
  }

  function gantt(run) {
    const spans = run.timeline;
    const axis = squeezed(spans);
    const order = [...new Set(spans.map((span) => span.lane))];
    const used = new Set(spans.map((span) => span.kind));
    const lanes = order.map((name) => {
      const own = spans.filter((span) => span.lane === name);
      // A stage lies below what happened within it.
      own.sort((one, other) => (other.kind === "stage") - (one.kind === "stage"));
      return el("div", { class: "lane" }, el("div", {}, name),
        el("div", { class: "bars" }, own.map((span) => bar(span, axis))));
    });
    const pauses = axis.pauses.length ? ` Left out: ${axis.pauses.map((seconds) =>
      `a pause of ${lopd.duration(seconds)}`).join(", ")}.` : "";
    return el("figure", { class: "gantt" },
      el("figcaption", {}, `What ran when, over ${lopd.duration(axis.total)}. ` +
        `The table above has the same in figures.${pauses}`),
      el("ul", { class: "key" }, Object.keys(kinds).filter((kind) => used.has(kind)).map((kind) =>
        el("li", {}, el("span", { class: `swatch ${cls(kind)}`, "aria-hidden": "true" }),
          kind === "stage" ? "stage" : kinds[kind]))),
      el("div", { "aria-hidden": "true" }, lanes, scale(axis)));
  }

  // The time since the beginning, without the pauses.
  function scale(axis) {
    const marks = [0, 0.25, 0.5, 0.75, 1].map((part) =>
      el("span", {}, part ? lopd.duration(part * axis.total) : "0:00"));
    return el("div", { class: "lane" }, el("div", {}, "time"),
      el("div", { class: "ticks" }, marks));
  }

  function cls(kind) {
    return `k-${kind.replaceAll(" ", "-")}`;
  }

  function bar(span, axis) {
    const left = axis.place(span.start);
    const width = Math.max(axis.place(span.end) - left, 0.05);
    return el("span", { class: `bar ${cls(span.kind)}`, style: `left:${left}%;width:${width}%`,
      title: `${span.label}: ${lopd.duration(span.end - span.start)}, from ` +
        `${new Date(1000 * span.start).toISOString().slice(0, 19).replace("T", " ")} UTC` });
  }

  // A run may have been continued days later. Long times in which nothing ran are left out.
  function squeezed(spans) {
    const busy = [];
    for (const span of [...spans].sort((one, other) => one.start - other.start)) {
      const last = busy[busy.length - 1];
      if (last && span.start <= last.end) last.end = Math.max(last.end, span.end);
      else busy.push({ start: span.start, end: span.end });
    }
    const active = busy.reduce((sum, part) => sum + part.end - part.start, 0);
    const most = Math.max(1, 0.03 * active);
    const pauses = [];
    let at = 0;
    busy.forEach((part, index) => {
      if (index) {
        const gap = part.start - busy[index - 1].end;
        if (gap > most) pauses.push(gap);
        at += Math.min(gap, most);
      }
      part.at = at;
      at += part.end - part.start;
    });
    const total = Math.max(at, 1e-9);
    const place = (time) => {
      const part = [...busy].reverse().find((one) => one.start <= time) || busy[0];
      return (100 * (part.at + Math.min(time, part.end) - part.start)) / total;
    };
    return { place, total, pauses };
  }
};
