// Transcripts: the same prompt answered by several models, each token with its figures.
lopd.showTranscripts = function (section) {
  const el = lopd.el;
  const { runs } = lopd.data;
  const sets = joined();
  if (!sets.length) return false;
  const PAGE = 50;
  const state = { set: sets[0], before: 0, after: 0, filter: "all", sort: "order", text: "",
    shown: PAGE, chosen: null };

  const count = el("p", { role: "status" });
  const note = el("p", { class: "muted" });
  const list = el("ol", { class: "results" });
  const more = el("button", { class: "plain", type: "button",
    onclick: () => { state.shown += PAGE; fillList(); } }, "Show more");
  const detail = el("div", { "aria-live": "off" });
  const figures = el("div", { class: "figures", hidden: true },
    el("p", { role: "status", id: "token-figures" }));
  const show = lopd.answerView(section, detail, figures);
  const search = el("input", { type: "search", placeholder: "text or prompt id",
    oninput: () => { state.text = search.value; refresh(); } });
  const setBox = lopd.select("Prompts", sets.map((set, index) => [String(index), set.title]),
    (value) => useSet(sets[value]));
  const before = lopd.select("Before", [], (value) => { state.before = Number(value); refresh(); });
  const after = lopd.select("After", [], (value) => { state.after = Number(value); refresh(); });
  const filter = lopd.select("Show", [["all", "all prompts"],
    ...["answered", "better", "worse", "won", "lost", "wrong", "nearer", "further", "cut"].map((one) =>
      [one, one])],
    (value) => { state.filter = value; refresh(); });
  const sort = lopd.select("Sort by", [["order", "order of the prompts"], ["mean", ""],
    ["token", ""], ["longest", ""]], (value) => { state.sort = value; refresh(); });
  const special = el("input", { type: "checkbox", id: "special", onchange: () =>
    section.classList.toggle("show-special", special.checked) });

  section.append(
    el("div", { class: "controls" }, setBox.field, before.field, after.field, filter.field,
      sort.field, el("div", {}, el("label", {}, "Search", search)),
      el("label", { class: "check" }, special, "Show special tokens and the chat template")),
    legend(), note, count,
    el("div", { class: "browser" }, el("div", {}, list, more), detail), figures);
  useSet(sets[0]);
  return true;

  // Prompts of all runs by their set, their name and their tokens: other prompts may have the name.
  function joined() {
    const byName = new Map();
    runs.forEach((run, source) => {
      for (const set of run.sets) {
        if (!byName.has(set.name))
          byName.set(set.name, { name: set.name, title: set.title, columns: [], rows: new Map(),
            notes: [] });
        const all = byName.get(set.name);
        const offset = all.columns.length;
        const several = runs.length > 1;
        set.models.forEach((model) => all.columns.push({ source, model: model.name,
          title: several ? `${run.name}: ${model.title}` : model.title }));
        if (!run.has_tokenizer) all.notes.push(`${run.name}: no tokenizer was found, so texts ` +
          "are numbers of tokens. Give lopd report --tokenizer FOLDER.");
        if (set.outdated) all.notes.push(`${run.name}: outdated, the evaluation is of ` +
          `${set.outdated}.`);
        if (set.prompts.length < set.total) all.notes.push(sampled(run, set));
        for (const prompt of set.prompts) {
          const key = `${prompt.id}\u0000${prompt.prompt.join(",")}`;
          if (!all.rows.has(key))
            all.rows.set(key, { id: prompt.id, prompt: prompt.prompt, answers: [] });
          for (const answer of prompt.answers)
            all.rows.get(key).answers.push({ ...answer, column: offset + answer.model });
        }
      }
    });
    return [...byName.values()].map((set) => ({ ...set, rows: [...set.rows.values()] }));
  }

  function sampled(run, set) {
    const strongest = set.strongest
      ? `${lopd.count(set.strongest)} of the strongest disagreement and ` : "";
    return `${run.name}: this page holds ${lopd.count(set.prompts.length)} of ` +
      `${lopd.count(set.total)} prompts, ${strongest}` +
      `${lopd.count(set.prompts.length - set.strongest)} drawn at random. ` +
      "The figures above are of all of them.";
  }

  function legend() {
    const mark = (name, text) => el("span", { class: `t ${name}` }, text);
    return el("p", {}, "log \u03c0_teacher \u2212 log \u03c0_student: the teacher finds a token ",
      mark("less-1", "less likely"), " by half a nat, ", mark("less-2", "by 2"), ", ",
      mark("less-3", "by 5"), " (orange, wavy line), or ", mark("more-1", "more likely"), ", ",
      mark("more-2", "by 2"), ", ", mark("more-3", "by 5"), " (blue, straight line). Point at a " +
      "token, or go through a text with the arrow keys (with Shift: to the next one beyond 1 nat).");
  }

  function useSet(set) {
    state.set = set;
    const options = (box, wanted, otherwise) => {
      box.replaceChildren(...set.columns.map((column, index) =>
        el("option", { value: String(index) }, column.title)));
      const found = set.columns.findIndex((column) => column.model === wanted);
      box.value = String(found < 0 ? otherwise : found);
      return Number(box.value);
    };
    // Of refreshed rollouts the newest ones are the last.
    const last = set.columns.length - 1;
    state.before = options(before.box, "sft", 0);
    // With two runs, the second run's student is what one wants to compare with the first one's.
    const finals = set.columns.flatMap((column, index) =>
      ["distilled", "model"].includes(column.model) ? [index] : []);
    if (runs.length > 1 && finals.length > 1) {
      options(after.box, "distilled", last);
      before.box.value = String(finals[0]);
      after.box.value = String(finals[1]);
      state.before = finals[0];
      state.after = finals[1];
    } else state.after = options(after.box, "distilled", last);
    note.textContent = set.notes.join(" ");
    state.chosen = null;
    refresh();
  }

  function of(row, column) {
    return row.answers.filter((answer) => answer.column === column);
  }

  // The share of right answers, or null where nobody judged.
  function rightShare(row, column) {
    const judged = of(row, column).filter((answer) => answer.right !== undefined);
    if (!judged.length) return null;
    return judged.filter((answer) => answer.right).length / judged.length;
  }

  function disagreement(row, kind, column) {
    let found = -1;
    for (const answer of of(row, column)) {
      const values = lopd.deviations(answer);
      if (!values || !values.length) continue;
      const sizes = values.map(Math.abs);
      found = Math.max(found, kind === "mean"
        ? sizes.reduce((a, b) => a + b, 0) / sizes.length : sizes.reduce((a, b) => Math.max(a, b)));
    }
    return found;
  }

  function matches(row) {
    const a = rightShare(row, state.before);
    const b = rightShare(row, state.after);
    const both = a !== null && b !== null;
    // Where nothing is judged, nearer to the teacher is all that can be said.
    const nearer = () => {
      const [one, other] = [state.before, state.after].map((column) =>
        disagreement(row, "mean", column));
      return one < 0 || other < 0 ? 0 : Math.sign(one - other);
    };
    const answered = of(row, state.before).length > 0 && of(row, state.after).length > 0;
    const rules = { all: () => true, answered: () => answered, better: () => both && a < b, worse: () => both && a > b,
      won: () => both && a === 0 && b === 1, lost: () => both && a === 1 && b === 0,
      wrong: () => b !== null && b < 1, nearer: () => nearer() > 0, further: () => nearer() < 0,
      cut: () => of(row, state.after).some((one) => one.finish === "length") };
    if (!rules[state.filter]()) return false;
    const wanted = state.text.trim().toLowerCase();
    if (!wanted) return true;
    // Made once: a page may hold a million tokens.
    row.searched ??= [row.id, lopd.textOf(row.prompt, true),
      ...row.answers.map((answer) => lopd.textOf(answer.tokens, true))].join("\n").toLowerCase();
    return row.searched.includes(wanted);
  }

  function refresh() {
    nameChoices();
    let rows = state.set.rows.filter(matches);
    const length = (row) => Math.max(0, ...of(row, state.after).map((one) => one.tokens.length));
    const keys = { mean: (row) => disagreement(row, "mean", state.after),
      token: (row) => disagreement(row, "token", state.after), longest: length };
    if (state.sort in keys) {
      const known = new Map(rows.map((row) => [row, keys[state.sort](row)]));
      rows = rows.sort((one, other) => known.get(other) - known.get(one));
    }
    state.rows = rows;
    state.shown = PAGE;
    const all = lopd.count(state.set.rows.length);
    count.textContent = `${lopd.count(rows.length)} of ${all} prompts`;
    fillList();
    if (!rows.includes(state.chosen)) choose(rows[0] || null);
    else choose(state.chosen);
  }

  function fillList() {
    list.replaceChildren(...state.rows.slice(0, state.shown).map((row) => {
      const prompt = lopd.textOf(row.prompt, false).trim().replace(/\s+/g, " ");
      const button = el("button", { type: "button", onclick: () => choose(row) },
        el("span", { class: "snippet" }, prompt.slice(0, 90) || row.id),
        el("span", { class: "about" }, `${row.id} \u00b7 ${about(row)}`));
      button.row = row;
      return el("li", {}, button);
    }));
    more.hidden = state.rows.length <= state.shown;
    mark();
  }

  function about(row) {
    const parts = [];
    const told = (share) => (share === 1 ? "right" : share === 0 ? "wrong"
      : `${lopd.percent(share, 0)} right`);
    const [a, b] = [rightShare(row, state.before), rightShare(row, state.after)];
    if (a !== null && b !== null && state.before !== state.after)
      parts.push(`${told(a)} \u2192 ${told(b)}`);
    else if (b !== null) parts.push(told(b));
    const size = disagreement(row, "mean", state.after);
    if (size >= 0) parts.push(`${size.toFixed(3)} nats a token`);
    if (of(row, state.after).some((one) => one.finish === "length")) parts.push("cut off");
    return parts.join(" \u00b7 ");
  }

  function mark() {
    for (const button of list.querySelectorAll("button"))
      button.setAttribute("aria-current", String(button.row === state.chosen));
  }

  function choose(row) {
    state.chosen = row;
    mark();
    figures.hidden = true;
    if (!row) {
      detail.replaceChildren(el("p", {}, "No prompt matches."));
      return;
    }
    const { columns } = state.set;
    const first = [state.before, state.after,
      columns.findIndex((column) => column.model === "teacher")];
    const [one, other] = words();
    const titles = columns.map((column, index) => {
      const word = state.before === state.after ? "" : index === state.before ? one
        : index === state.after ? other : "";
      return (word ? `${word}: ` : "") + column.title;
    });
    show(row, first, titles);
  }

  // Two models of one run are the same student before and after. Those of two runs are two models.
  function words() {
    const [one, other] = [state.before, state.after].map((index) => state.set.columns[index]);
    return one.source === other.source ? ["before", "after"] : ["first", "second"];
  }

  function nameChoices() {
    const [one, other] = words();
    const upper = (word) => word[0].toUpperCase() + word.slice(1);
    before.field.querySelector("label").firstChild.data = upper(one);
    after.field.querySelector("label").firstChild.data = upper(other);
    const texts = one === "before"
      ? { answered: "answered before and after", better: "got better (more samples right after)", worse: "got worse (fewer right after)",
        won: "wrong before, right after", lost: "right before, wrong after", wrong: "wrong after",
        nearer: "nearer to the teacher after", further: "further from the teacher after",
        cut: "cut off after" }
      : { answered: "answered by both", better: "the second is better (more samples right)", worse: "the first is better",
        won: "first wrong, second right", lost: "first right, second wrong",
        wrong: "second wrong", nearer: "the second is nearer to the teacher",
        further: "the first is nearer to the teacher", cut: "second cut off" };
    for (const option of filter.box.options)
      if (option.value in texts) option.textContent = texts[option.value];
    const sorts = { mean: "mean disagreement", token: "strongest token",
      longest: "longest answer" };
    const whose = other === "after" ? "after" : "of the second";
    for (const option of sort.box.options)
      if (option.value in sorts) option.textContent = `${sorts[option.value]} ${whose}`;
  }
};
