// Unpacks the data and fills the sections. A section without anything to show stays away.
(async function () {
  const state = document.getElementById("state");
  const began = performance.now();
  try {
    lopd.data = await lopd.unpack();
    const panels = { overview: lopd.showOverview, pipeline: lopd.showPipeline,
      curves: lopd.showCurves, tokens: lopd.showTokens, transcripts: lopd.showTranscripts };
    for (const [name, show] of Object.entries(panels)) {
      const section = document.getElementById(name);
      if (show(section)) section.hidden = false;
      else document.querySelector(`nav a[href="#${name}"]`).remove();
    }
    lopd.watchCharts();
    state.hidden = true;
    document.documentElement.dataset.ready = String(Math.round(performance.now() - began));
    // The place that the address names did not exist when the browser looked for it.
    if (location.hash) document.querySelector(location.hash)?.scrollIntoView();
  } catch (error) {
    state.textContent = `The report cannot be shown (${error.message}). It needs a browser of ` +
      "2023 or newer.";
    throw error;
  }
})();
