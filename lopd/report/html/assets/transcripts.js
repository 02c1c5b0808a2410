// Transcripts: the same prompt answered by several models, each token with its figures.
lopd.showTranscripts = function (section) {
  const el = lopd.el;
  const { runs, vocabulary } = lopd.data;
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
  const search = el("input", { type: "search", placeholder: "text or prompt id",
    oninput: () => { state.text = search.value; refresh(); } });
  const setBox = lopd.select("Prompts", sets.map((set, index) => [String(index), set.title]),
    (value) => useSet(sets[value]));
  const before = lopd.select("Before", [], (value) => { state.before = Number(value); refresh(); });
  const after = lopd.select("After", [], (value) => { state.after = Number(value); refresh(); });
  const filter = lopd.select("Show", [["all", "all prompts"],
    ["won", "wrong before, right after"], ["lost", "right before, wrong after"],
    ["wrong", "wrong after"], ["cut", "cut off after"]],
    (value) => { state.filter = value; refresh(); });
  const sort = lopd.select("Sort by", [["order", "order of the prompts"],
    ["mean", "mean disagreement after"], ["token", "strongest token after"],
    ["longest", "longest answer after"]], (value) => { state.sort = value; refresh(); });
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
        if (!run.has_tokenizer) all.notes.push(`${run.name}: no tokenizer was found, so texts are ` +
          "numbers of tokens. Give lopd report --tokenizer FOLDER.");
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

  function deviations(answer) {
    if (!answer.teacher) return null;
    return answer.teacher.map((value, index) =>
      value === null || answer.student[index] === null ? 0 : (value - answer.student[index]) / 1000);
  }

  function disagreement(row, kind) {
    let found = -1;
    for (const answer of of(row, state.after)) {
      const values = deviations(answer);
      if (!values || !values.length) continue;
      const sizes = values.map(Math.abs);
      found = Math.max(found, kind === "mean"
        ? sizes.reduce((a, b) => a + b, 0) / sizes.length : sizes.reduce((a, b) => Math.max(a, b)));
    }
    return found;
  }

  function textOf(tokens, withSpecial) {
    return tokens.map((index) => {
      const [text, , isSpecial] = vocabulary[index];
      return isSpecial && !withSpecial ? "" : text;
    }).join("");
  }

  function matches(row) {
    const a = rightShare(row, state.before);
    const b = rightShare(row, state.after);
    if (state.filter === "won" && !(a !== null && b !== null && a < b)) return false;
    if (state.filter === "lost" && !(a !== null && b !== null && a > b)) return false;
    if (state.filter === "wrong" && !(b !== null && b < 1)) return false;
    if (state.filter === "cut" && !of(row, state.after).some((one) => one.finish === "length"))
      return false;
    const wanted = state.text.trim().toLowerCase();
    if (!wanted) return true;
    // Made once: a page may hold a million tokens.
    row.searched ??= [row.id, textOf(row.prompt, true),
      ...row.answers.map((answer) => textOf(answer.tokens, true))].join("\n").toLowerCase();
    return row.searched.includes(wanted);
  }

  function refresh() {
    let rows = state.set.rows.filter(matches);
    const length = (row) => Math.max(0, ...of(row, state.after).map((one) => one.tokens.length));
    const keys = { mean: (row) => disagreement(row, "mean"),
      token: (row) => disagreement(row, "token"), longest: length };
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
      const prompt = textOf(row.prompt, false).trim().replace(/\s+/g, " ");
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
    const size = disagreement(row, "mean");
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
    const first = [state.before, state.after,
      state.set.columns.findIndex((column) => column.model === "teacher")];
    const columns = [...new Set(first)].filter((column) => column >= 0);
    const others = state.set.columns.map((_, index) => index)
      .filter((index) => !columns.includes(index) && of(row, index).length);
    const cells = (wanted) => el("div", { class: "answers" }, wanted.flatMap((column) =>
      of(row, column).map((answer) => shown(answer, state.set.columns[column].title))));
    detail.replaceChildren(
      el("h3", {}, `Prompt ${row.id}`),
      el("div", { class: "text", tabindex: "0", role: "group", "aria-label": "Prompt" },
        row.prompt.map((index) => piece([index], null, null))),
      cells(columns),
      others.length ? el("details", {}, el("summary", {}, `${others.length} other models`),
        cells(others)) : "");
  }

  function shown(answer, title) {
    const verdict = answer.right === undefined ? "" : answer.right ? "right"
      : `wrong${answer.reason ? ` (${answer.reason})` : ""}`;
    const values = deviations(answer);
    const length = `${lopd.count(answer.tokens.length)} tokens`;
    const end = { stop: "ended by itself", length: "cut off" }[answer.finish] || answer.finish;
    const sum = values ? `, sum ${lopd.signed(values.reduce((a, b) => a + b, 0), 2)} nats` : "";
    const groups = grouped(answer.tokens);
    const text = el("div", { class: "text", tabindex: "0", role: "group",
      "aria-label": `Answer of the ${title}. ${verdict}. Arrow keys go through its tokens.` },
      groups.map((group) => piece(group.map((at) => answer.tokens[at]), group, values)));
    listen(text, answer, groups, values);
    const sample = answer.sample ? ` (sample ${answer.sample})` : "";
    return el("div", {}, el("h4", {}, `${title}${sample}`),
      verdict ? el("p", { class: "verdict" }, `${answer.right ? "\u2713" : "\u2717"} ${verdict}` +
        (answer.found ? `, found: ${answer.found}` : "")) : null,
      el("p", { class: "muted" }, `${length}, ${end}${sum}`), text);
  }

  // A character may consist of several tokens, of which the last one has its text. They are one
  // piece: each of them alone is no text that could be coloured.
  function grouped(tokens) {
    const groups = [];
    let open = [];
    tokens.forEach((index, at) => {
      open.push(at);
      if (vocabulary[index][0] !== "" || at === tokens.length - 1) {
        groups.push(open);
        open = [];
      }
    });
    return groups;
  }

  function piece(indices, group, values) {
    const text = indices.map((index) => vocabulary[index][0]).join("");
    const classes = ["t"];
    if (vocabulary[indices[indices.length - 1]][2]) classes.push("special");
    if (values && group) {
      const value = group.reduce((sum, at) => sum + values[at], 0);
      const size = Math.abs(value);
      const level = size > 5 ? 3 : size > 2 ? 2 : size > 0.5 ? 1 : 0;
      if (level) {
        classes.push(`${value < 0 ? "less" : "more"}-${level}`);
        // An end token on which the models disagree is not hidden: it is what matters most.
        if (classes.includes("special")) classes.push("marked");
        // A line break has no width that a colour could fill.
        if (text.startsWith("\n")) classes.push("break");
      }
    }
    return el("span", { class: classes.join(" ") }, text);
  }

  function listen(text, answer, groups, values) {
    let at = -1;
    const spans = [...text.children];
    const go = (index, scroll) => {
      section.querySelectorAll(".t.now").forEach((one) => one.classList.remove("now"));
      at = index;
      spans[at].classList.add("now");
      if (scroll) spans[at].scrollIntoView({ block: "nearest" });
      figures.hidden = false;
      figures.firstChild.textContent = groups[at].map((token) =>
        told(answer, token, values)).join(" | ");
    };
    const find = (event) => spans.indexOf(event.target.closest(".t"));
    text.addEventListener("mouseover", (event) => {
      const index = find(event);
      if (index >= 0) go(index, false);
    });
    text.addEventListener("click", (event) => {
      const index = find(event);
      if (index >= 0) go(index, false);
    });
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { figures.hidden = true; return; }
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const ends = { Home: 0, End: spans.length - 1 };
      if (event.key in ends) { event.preventDefault(); go(ends[event.key], true); return; }
      if (!step) return;
      event.preventDefault();
      const large = (index) => groups[index].some((token) => values && Math.abs(values[token]) > 1);
      let next = at + step;
      if (event.shiftKey) while (spans[next] && !large(next)) next += step;
      if (spans[next]) go(next, true);
    });
  }

  function told(answer, at, values) {
    const [text, id] = vocabulary[answer.tokens[at]];
    const parts = [`token ${at + 1} of ${answer.tokens.length}: ` +
      (text === "" ? "(begins a character)" : JSON.stringify(text)), `id ${id}`];
    const named = (name, value) => {
      if (value === null || value === undefined) return;
      const nats = value / 1000;
      parts.push(`log \u03c0_${name} ${nats.toFixed(3).replace("-", "\u2212")} ` +
        `(${lopd.percent(Math.exp(nats), 2)})`);
    };
    if (answer.teacher) named("teacher", answer.teacher[at]);
    named("student", answer.student[at]);
    if (values) parts.push(`difference ${lopd.signed(values[at], 3)} nats`);
    return parts.join(", ");
  }
};
