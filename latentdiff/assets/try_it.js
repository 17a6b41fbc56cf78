
// Try it: asks the server for an image, then for the training image nearest to it.
{
  const byId = (id) => document.getElementById(id);
  const panel = byId("try");
  const place = location.pathname.replace(/\/$/, "");
  const MAX_FILE = 14e6; // bytes: in base64 it is within the server's limit
  const LOOKING = "being looked for …";
  const PIXELATED = 64; // pixels; smaller images are shown with their pixels as squares
  let start = null; // the image to start from, as a data URI
  let asking = null;

  function say(text, failed = false) {
    byId("status").textContent = text;
    byId("status").hidden = !text;
    byId("status").classList.toggle("failed", failed);
  }

  async function ask(what, values) {
    const answer = await fetch(`${place}/${what}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(values),
      signal: asking.signal,
    });
    const said = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    if (said.error) throw new Error(said.error);
    return said;
  }

  async function show(image, source) {
    image.src = source;
    await image.decode();
    image.classList.toggle("pixelated", image.naturalWidth <= PIXELATED);
    image.hidden = false;
  }

  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));

  function wanted() {
    const values = {
      prompt: byId("prompt").value,
      seed: number("seed"),
      sampler: byId("sampler").value || null,
      num_inference_steps: number("steps"),
      guidance_scale: number("guidance"),
      weights: byId("weights").value,
    };
    return start === null ? values : { ...values, image: start, strength: number("strength") };
  }

  async function generated() {
    say("Generating, or waiting for its turn …");
    byId("results").classList.add("old");
    const made = await ask("generate", wanted());
    await show(byId("image"), made.image);
    const used = made.settings;
    const weights = made.weights === "published" ? "published weights" : `weights of step ${made.weights}`;
    byId("settings").textContent =
      `seed ${made.seed} · ${used.sampler}, ${used.num_inference_steps} steps, guidance ${used.guidance_scale} · ` +
      `${weights} · ${made.seconds} s`;
    byId("notes").replaceChildren(
      ...made.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })),
    );
    byId("nearest").hidden = byId("copy").hidden = true;
    byId("caption").textContent = "";
    byId("near").textContent = LOOKING;
    byId("results").classList.remove("old");
    byId("results").hidden = false;
    say("");
    return made.image;
  }

  async function compared(image) {
    const found = await ask("nearest", { image });
    if (found.unknown) {
      byId("near").textContent = found.unknown;
      return;
    }
    await show(byId("nearest"), found.image);
    byId("copy").hidden = !found.copy;
    byId("caption").textContent = found.caption;
    const among = found.compared < found.total ? `${found.compared} of ${found.total}` : `${found.total}`;
    const second = found.second === null ? "" : `, the second nearest ${found.second.toFixed(1)}`;
    byId("near").textContent =
      `${found.distance.toFixed(1)} away${second}, of ${among} images (root mean square of values 0 to 255)`;
  }

  byId("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    asking = new AbortController();
    byId("go").disabled = true;
    byId("stop").hidden = false;
    try {
      await compared(await generated());
    } catch (error) {
      say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
      if (byId("near").textContent === LOOKING) byId("near").textContent = "not looked for";
      byId("results").classList.remove("old");
    }
    byId("go").disabled = false;
    byId("stop").hidden = true;
  });
  byId("stop").addEventListener("click", () => asking.abort());

  function startFrom(file) {
    if (!file) return;
    if (file.size > MAX_FILE) {
      say(`${file.name} has more than ${MAX_FILE / 1e6} MB`, true);
      return;
    }
    const reader = new FileReader();
    reader.addEventListener("load", () => {
      start = reader.result;
      byId("start").src = start;
      byId("start").hidden = byId("started").hidden = false;
      say("");
    });
    reader.readAsDataURL(file);
  }

  byId("file").addEventListener("change", () => startFrom(byId("file").files[0]));
  byId("clear").addEventListener("click", () => {
    start = null;
    byId("file").value = "";
    byId("start").hidden = byId("started").hidden = true;
  });
  byId("strength").addEventListener("input", () => (byId("amount").textContent = Number(byId("strength").value).toFixed(2)));
  for (const name of ["dragenter", "dragover"]) {
    panel.addEventListener(name, (event) => {
      event.preventDefault();
      panel.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) panel.addEventListener(name, () => panel.classList.remove("over"));
  panel.addEventListener("drop", (event) => {
    event.preventDefault();
    startFrom(event.dataTransfer.files[0]);
  });
}
