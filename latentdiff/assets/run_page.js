// Samples over time: the slider and the film strip choose the grid that is shown.
const slider = document.getElementById("slider");
const film = [...document.querySelectorAll(".film button")];
const layouts = [...document.querySelectorAll(".cells[data-layout]")];

function show(index) {
  const chosen = film[index];
  for (const button of film) button.setAttribute("aria-pressed", button === chosen);
  for (const layout of layouts) {
    layout.hidden = layout.dataset.layout !== chosen.dataset.layout;
    if (!layout.hidden) layout.querySelector("image").setAttribute("href", chosen.firstElementChild.src);
  }
  document.getElementById("at").textContent = chosen.title;
  slider.value = index;
}

if (slider) {
  slider.addEventListener("input", () => show(Number(slider.value)));
  film.forEach((button, index) => button.addEventListener("click", () => show(index)));
  show(film.length - 1);
}
for (const strip of document.querySelectorAll(".film, .scroll")) strip.scrollLeft = strip.scrollWidth; // the newest
