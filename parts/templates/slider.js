"use strict";
// One slider moves through the moments of training: what is of a moment has data-from and data-until, the
// first and the last position at which it is shown; cursors of curves stand at the positions in data-x.
(function () {
  const slider = document.getElementById("moment");
  if (!slider) return;
  const parts = document.querySelectorAll("[data-from]");
  const cursors = document.querySelectorAll(".cursor");
  const rows = document.querySelectorAll("tr[data-moment]");
  const x = slider.dataset.x.split(" ");
  const labels = slider.dataset.labels.split("|");
  let turn = null;  // the button whose sounds are played in turn

  const visible = (audio) => !audio.closest("[hidden]");

  // Show moment i. A sound that is playing goes on as the same clip's sound at that moment.
  function show(i) {
    const playing = [...document.querySelectorAll(".slot audio")].filter((audio) => !audio.paused);
    for (const part of parts) {
      const inside = Number(part.dataset.from) <= i && i <= Number(part.dataset.until);
      part.toggleAttribute("hidden", !inside);
    }
    for (const cursor of cursors) cursor.setAttribute("transform", `translate(${x[i]} 0)`);
    for (const row of rows) {
      const now = Number(row.dataset.moment) === i;
      row.classList.toggle("now", now);
      now ? row.setAttribute("aria-current", "step") : row.removeAttribute("aria-current");
    }
    for (const audio of document.querySelectorAll(".slot audio")) {
      if (visible(audio)) audio.preload = "auto";
    }
    for (const audio of playing) {
      if (visible(audio)) continue;
      audio.pause();
      const next = [...audio.closest(".slot").querySelectorAll("audio")].find(visible);
      if (next && !turn) start(next);
    }
    slider.setAttribute("aria-valuetext", labels[i]);
  }

  function start(audio) {
    audio.currentTime = 0;
    return audio.play().catch(() => {});
  }

  function write(button, text) {
    button.textContent = text;
    button.setAttribute("aria-label", `${text}: ${button.dataset.caption}`);
  }

  // Play the sounds of a slot in turn, moving the slider to where each begins to be shown.
  async function playInTurn(button) {
    const slot = document.getElementById(button.dataset.slot);
    turn = button;
    write(button, "stop");
    for (const figure of slot.querySelectorAll("figure")) {
      if (turn !== button) break;
      slider.value = figure.dataset.from;
      show(Number(figure.dataset.from));
      const audio = figure.querySelector("audio");
      const over = new Promise((done) => {
        for (const name of ["ended", "pause", "error"]) audio.addEventListener(name, done, {once: true});
      });
      await start(audio);
      if (audio.paused && !audio.ended) break;
      await over;
      if (!audio.ended) break;
    }
    write(button, button.dataset.text);
    if (turn === button) turn = null;
  }

  slider.addEventListener("input", () => {
    turn = null;
    show(Number(slider.value));
  });
  for (const button of document.querySelectorAll("button[data-slot]")) {
    button.addEventListener("click", () => {
      if (turn !== button) return playInTurn(button);
      turn = null;
      for (const audio of document.querySelectorAll("audio")) audio.pause();
    });
  }
  // One sound at a time.
  document.addEventListener("play", (event) => {
    for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
  }, true);
  show(Number(slider.value));
})();
