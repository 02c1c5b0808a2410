// The answers to one prompt side by side, each token coloured by its deviation, with its figures.

// The deviations of an answer in nats, or null where nobody scored it.
lopd.deviations = function (answer) {
  if (!answer.teacher) return null;
  return answer.teacher.map((value, index) =>
    value === null || answer.student[index] === null ? 0 : (value - answer.student[index]) / 1000);
};

lopd.textOf = function (tokens, withSpecial) {
  return tokens.map((index) => {
    const [text, , isSpecial] = lopd.data.vocabulary[index];
    return isSpecial && !withSpecial ? "" : text;
  }).join("");
};

// Returns a function that shows a prompt in `detail`. `figures` is the line that says what is known
// of the token that is pointed at.
lopd.answerView = function (section, detail, figures) {
  const el = lopd.el;
  const { vocabulary } = lopd.data;
  return show;

  // Shows the answers of the columns in `first`, and those of others on demand. `titles` are those
  // of the columns.
  function show(row, first, titles) {
    const columns = [...new Set(first)].filter((column) => column >= 0);
    const others = titles.map((_, index) => index).filter((index) => !columns.includes(index) &&
      row.answers.some((answer) => answer.column === index));
    const several = row.answers.some((answer) => answer.sample);
    const cells = (wanted) => el("div", { class: "answers" },
      merged(wanted.flatMap((column) => row.answers.filter((one) => one.column === column)))
        .map((same) => shown(same, titles, several)));
    detail.replaceChildren(
      el("h3", {}, `Prompt ${row.id}`),
      el("div", { class: "text", tabindex: "0", role: "group", "aria-label": "Prompt" },
        row.prompt.map((index) => piece([index], null, null))),
      cells(columns),
      others.length ? el("details", {}, el("summary", {}, `${others.length} other model` +
        (others.length === 1 ? "" : "s")),
        cells(others)) : "");
  }

  // Answers of the same tokens are shown once, with the names of all who gave them.
  function merged(answers) {
    const groups = new Map();
    for (const answer of answers) {
      const key = `${answer.finish} ${answer.right} ${answer.tokens.join(",")}`;
      groups.set(key, [...(groups.get(key) || []), answer]);
    }
    return [...groups.values()];
  }

  // The names of all who gave an answer, each model once with its samples.
  function namesOf(same, titles, several) {
    return [...new Set(same.map((one) => one.column))].map((column) => {
      const samples = same.filter((one) => one.column === column).map((one) => one.sample);
      return titles[column] + (several
        ? ` (sample${samples.length > 1 ? "s" : ""} ${samples.join(", ")})` : "");
    });
  }

  function shown(same, titles, several) {
    const [answer] = same;
    const verdict = answer.right === undefined ? "" : answer.right ? "right"
      : `wrong${answer.reason ? ` (${answer.reason})` : ""}`;
    const names = namesOf(same, titles, several);
    const length = `${lopd.count(answer.tokens.length)} tokens`;
    const end = { stop: "ended by itself", length: "cut off" }[answer.finish] || answer.finish;
    const sums = same.map(lopd.deviations).filter((values) => values)
      .map((values) => lopd.signed(values.reduce((a, b) => a + b, 0), 2));
    const sum = sums.length ? `, sum ${[...new Set(sums)].join(" and ")} nats` : "";
    const values = lopd.deviations(answer);
    const groups = grouped(answer.tokens);
    const text = el("div", { class: "text", tabindex: "0", role: "group",
      "aria-label": `Answer: ${names.join(", ")}. ${verdict}. Arrow keys go through its tokens.` },
      groups.map((group) => piece(group.map((at) => answer.tokens[at]), group, values)));
    listen(text, same.map((one) => ({ answer: one, name: namesOf([one], titles, several)[0] })),
      groups, values);
    return el("div", {}, el("h4", {}, names.join(" = ")),
      verdict ? el("p", { class: "verdict" }, `${answer.right ? "\u2713" : "\u2717"} ${verdict}` +
        (answer.found ? `, found: ${answer.found}` : "") +
        (!answer.right && answer.expected ? `, expected: ${answer.expected}` : "")) : null,
      el("p", { class: "muted" }, `${length}, ${end}${sum}` +
        (same.length > 1 ? `. The same answer ${same.length} times, coloured for ${names[0]}.`
          : "")), text);
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

  function listen(text, same, groups, values) {
    let at = -1;
    const spans = [...text.children];
    const go = (index, scroll) => {
      section.querySelectorAll(".t.now").forEach((one) => one.classList.remove("now"));
      at = index;
      spans[at].classList.add("now");
      if (scroll) spans[at].scrollIntoView({ block: "nearest" });
      figures.hidden = false;
      figures.firstChild.textContent = groups[at].map((token) =>
        told(same, token)).join(" | ");
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

  function told(same, at) {
    const { answer } = same[0];
    const [text, id] = vocabulary[answer.tokens[at]];
    const parts = [`token ${at + 1} of ${answer.tokens.length}: ` +
      (text === "" ? "(begins a character)" : JSON.stringify(text)), `id ${id}`];
    if (answer.entropy && answer.entropy[at] !== null)
      parts.push(`entropy of the teacher ${(answer.entropy[at] / 1000).toFixed(3)} nats`);
    // Of the same answer of several models each has figures of its own.
    const told = same.map((one) => (same.length > 1 ? `${one.name}: ` : "") +
      figuresOf(one.answer, at).join(", ")).filter((one) => one);
    return [parts.join(", "), ...told].join(", ");
  }

  function figuresOf(answer, at) {
    const parts = [];
    const named = (name, value) => {
      if (value === null || value === undefined) return;
      const nats = value / 1000;
      parts.push(`log \u03c0_${name} ${nats.toFixed(3).replace("-", "\u2212")} ` +
        `(${lopd.percent(Math.exp(nats), 2)})`);
    };
    if (answer.teacher) named("teacher", answer.teacher[at]);
    named("student", answer.student[at]);
    const values = lopd.deviations(answer);
    if (values) parts.push(`difference ${lopd.signed(values[at], 3)} nats`);
    return parts;
  }
};
