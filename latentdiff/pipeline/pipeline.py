"""The pipeline: prompt -> context -> latents -> pixels -> image."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import EMBEDDED, open_images
from latentdiff.diffusion.samplers import Denoiser, randn
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.formats.diffusers_folder import COMPONENTS, INDEX, NO_COMPONENT
from latentdiff.formats.files import read_json, write_json
from latentdiff.formats.scheduler_config import read_scheduler_config, write_scheduler_config
from latentdiff.images import View, prepare, to_images, to_pixels
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.eval_mode import eval_mode
from latentdiff.models.pixel_space import Autoencoder, PixelSpace
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tiling import decode_in_parts, encode_in_parts
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline.folder import GENERATION_FILE, SCHEDULED, _local_folder, _read_defaults
from latentdiff.pipeline.guidance import GuidedDenoiser
from latentdiff.pipeline.options import (
    GenerationDefaults,
    Request,
    check_latents,
    check_request,
    images_of,
    integer,
    mask_weights,
    number,
    or_default,
)
from latentdiff.pipeline.preview import PREVIEW_FILE, LatentPreview, fit_preview
from latentdiff.pipeline.prompts import encode_prompts
from latentdiff.pipeline.start import FromImage, FromNoise, slerp


class NonFiniteError(ValueError):
    """Sampling gave NaN or infinity instead of an image."""


@dataclass(frozen=True)
class PipelineOutput(Sequence[Image.Image]):
    """The images of a call, in order; it is also a sequence of them.

    seeds: of each image's noise; the same call with them repeats it.
    latents: [B, C, h, w], what was decoded.
    """

    images: list[Image.Image]
    seeds: list[int]
    latents: Tensor = field(repr=False, compare=False)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)


class LatentDiffusionPipeline:
    """Chains tokenizer, text encoder, UNet sampler and VAE decoder.

    pipeline = LatentDiffusionPipeline.from_pretrained("saved/demo")
    pipeline("a red apple", seed=3).images[0].save("apple.png")
    """

    def __init__(
        self,
        vae: Autoencoder,
        unet: UNet,
        text_encoder: TextEncoder,
        tokenizer: CLIPTokenizer,
        schedule: NoiseSchedule,
        defaults: GenerationDefaults = GenerationDefaults(),  # noqa: B008 (immutable)
    ) -> None:
        """A PixelSpace as `vae` makes it a pipeline without autoencoder, which clips its estimates to images' values.

        Raises ValueError if the parts do not fit together.
        """
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"the UNet takes {unet.config.in_channels} latent channels, but the autoencoder gives "
                f"{vae.config.latent_channels}"
            )
        if unet.config.out_channels != unet.config.in_channels:
            raise ValueError(f"the UNet takes {unet.config.in_channels} channels, but gives {unet.config.out_channels}")
        if unet.config.cross_attention_dim != text_encoder.hidden_size:
            raise ValueError(
                f"the UNet's cross_attention_dim is {unet.config.cross_attention_dim}, but the text encoder is "
                f"{text_encoder.hidden_size} wide"
            )
        if tokenizer.max_length > text_encoder.max_length:
            raise ValueError(
                f"the tokenizer makes rows of {tokenizer.max_length} tokens, but the text encoder reads at most "
                f"{text_encoder.max_length}"
            )
        self.vae = vae
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.defaults = defaults
        self._preview: LatentPreview | None = None

    # ------------------------------------------------------------------------------------------------------------------
    # Opening and saving

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, dtype: torch.dtype | None = None, variant: str | None = None
    ) -> "LatentDiffusionPipeline":
        """Open a folder in the diffusers layout, or a model id of the hub.

        `variant` picks files such as `diffusion_pytorch_model.fp16.safetensors`. Raises ValueError if the folder or a
        part of it is missing, broken or of a kind that is not supported.
        """
        folder = _local_folder(str(name_or_folder), variant)
        index = read_json(folder / "model_index.json")
        # Without its autoencoder a latent diffusion model's folder says so too, but does not clip.
        scheduler = folder / "scheduler" / "scheduler_config.json"
        in_pixel_space = index.get("vae") == NO_COMPONENT and read_json(scheduler).get("clip_sample") is True
        for part in COMPONENTS:
            if not (folder / part).is_dir() and not (part == "vae" and in_pixel_space):
                raise ValueError(f"{folder} has no {part}/ (model_index.json: {index.get(part)})")
        tokenizer = CLIPTokenizer.load(folder / "tokenizer")
        try:
            schedule, sampler, sigmas = read_scheduler_config(read_json(scheduler))
        except ValueError as error:
            raise ValueError(f"{scheduler}: {error}") from None
        unet = UNet.from_pretrained(folder / "unet", dtype=dtype, variant=variant)
        if in_pixel_space:
            vae = PixelSpace(unet.config.in_channels)
        else:
            vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, variant=variant)
        pipeline = cls(
            vae=vae,
            unet=unet,
            text_encoder=TextEncoder.from_pretrained(
                str(folder), frozen=True, subfolder="text_encoder", dtype=dtype, variant=variant
            ),
            tokenizer=tokenizer,
            schedule=schedule,
            defaults=_read_defaults(folder / GENERATION_FILE, sampler, sigmas),
        )
        if not in_pixel_space and (folder / "vae" / PREVIEW_FILE).is_file():
            pipeline._preview = LatentPreview.load(folder / "vae")
        return pipeline

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the diffusers layout, safetensors only; the index comes last, so that a folder with one is whole."""
        folder = Path(folder)
        scheduler = write_scheduler_config(self.schedule, self.defaults.sampler, self.defaults.sigmas, self.vae.bounded)
        (folder / "model_index.json").unlink(missing_ok=True)
        if isinstance(self.vae, AutoencoderKL):
            self.vae.save_pretrained(folder / "vae")
        self.unet.save_pretrained(folder / "unet")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save(folder / "tokenizer")
        write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
        defaults = {name: value for name, value in asdict(self.defaults).items() if name not in SCHEDULED}
        write_json(defaults, folder / GENERATION_FILE)
        index = INDEX | {"scheduler": ["diffusers", scheduler["_class_name"]]}
        if isinstance(self.vae, PixelSpace):
            index["vae"] = NO_COMPONENT
        write_json(index, folder / "model_index.json")

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "LatentDiffusionPipeline":
        """Move the models; returns the pipeline itself."""
        for module in self._modules():
            module.to(device=device, dtype=dtype)
        return self

    def compile(self, **options: Any) -> "LatentDiffusionPipeline":
        """Compile the UNet (torch.compile, with its options) for many images of one size; returns the pipeline."""
        self.unet.compile(**options)
        return self

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """In which type the UNet computes."""
        return self.unet.dtype

    # ------------------------------------------------------------------------------------------------------------------
    # Generating

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        **options: Any,
    ) -> PipelineOutput:
        """Generate images: `num_images_per_prompt` of each prompt, in the order of the prompts.

        height, width: pixels; the trained size by default.
        latents: starting noise [B, C, h, w] of unit variance instead of the seeds' own.
        options: see `Options`, which has all of them with their defaults.

        Raises ValueError for an empty or non-text prompt, lists of unequal lengths, sizes that do not divide, an
        unknown sampler, or steps outside 1 .. T.
        """
        request = self._request(prompt, options)
        shape = self._latent_shape(height, width)
        if latents is not None:
            check_latents(latents, (request.count, *shape))
        return self._generate(request, FromNoise(shape, self.device, latents))

    def check(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> None:
        """Raise the ValueError that a call with these arguments would; compute nothing."""
        self._request(prompt, options)
        self._latent_shape(height, width)

    def image_to_image(
        self,
        prompt: str | Sequence[str] | None,
        image: Image.Image | Sequence[Image.Image],
        strength: float = 0.75,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> PipelineOutput:
        """Change images after a prompt: noise them to a part of the way and denoise from there (Meng et al. 2022).

        image: one for all, or one a prompt; scaled and cropped to height x width if these are given, else its own size.
        strength: in 0 .. 1, the share of the steps that is made; 0 only encodes and decodes.
        options: see `Options`.

        Raises ValueError for a strength outside 0 .. 1, another number of images than prompts, and as a call.
        """
        request = self._request(prompt, options).after(strength)
        pixels = self._pixels(images_of("image", image, request), height, width)
        return self._generate(
            request, FromImage(self._encode(pixels, request.options.batch_size, request.options.tile))
        )

    def inpaint(
        self,
        prompt: str | Sequence[str] | None,
        image: Image.Image | Sequence[Image.Image],
        mask: Image.Image | Sequence[Image.Image],
        strength: float = 1.0,
        **options: Any,
    ) -> PipelineOutput:
        """Repaint the white part of a mask; pixels where it is black stay exactly as they are.

        mask: of the image's size; grey mixes the two, transparent parts are black. Each latent whose area the mask
            touches is repainted; the others are held at the image's own at every step, which the network sees (as in
            Lugmayr et al. 2022, without resampling).
        strength: as in `image_to_image`; at 1 the masked part starts from pure noise.
        image, options: as in `image_to_image`; the size is the image's own.

        Raises ValueError for a mask of another size or without any white, and as `image_to_image`.
        """
        request = self._request(prompt, options).after(strength)
        pixels = self._pixels(images_of("image", image, request), None, None)
        weights = mask_weights(mask, pixels, request)
        f = self.vae.config.downsampling
        latent_mask = (F.max_pool2d(weights, f) > 0).float()
        kept = self._encode(pixels, request.options.batch_size, request.options.tile)
        start = FromImage(kept, latent_mask.to(kept.device), afresh=strength == 1)
        output = self._generate(request, start)
        images = []
        for i, (new, old) in enumerate(zip(output.images, to_images(pixels), strict=True)):
            alpha = Image.fromarray((weights[i, 0] * 255).round().to(torch.uint8).numpy())
            images.append(Image.composite(new, old, alpha))
        return replace(output, images=images)

    def interpolate(
        self,
        prompts: tuple[str, str],
        seeds: tuple[int, int],
        frames: int = 8,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> PipelineOutput:
        """A way from one prompt and seed to another: noise by spherical, text states by linear interpolation.

        frames: images, both ends included, at least 2. All use the first seed's fresh noise, if any, and the output
            tells that seed for all of them. options: see `Options`; those with a row an image have two.

        Raises ValueError for anything but two prompts and two seeds, fewer than two frames, and as a call.
        """
        for name, two in [("prompts", prompts), ("seeds", seeds)]:
            if isinstance(two, str) or not isinstance(two, Sequence) or len(two) != 2:
                raise ValueError(f"{name} is {two!r}, must be two: where to start and where to end")
        if integer("frames", frames) < 2:
            raise ValueError(f"frames is {frames}, must be at least 2")
        ends = self._request(list(prompts), options | {"seed": list(seeds)})
        shape = self._latent_shape(height, width)
        places = torch.linspace(0, 1, frames)
        context, negative = self._contexts(ends)

        def between(states: Tensor) -> Tensor:
            return torch.stack([torch.lerp(*states, place) for place in places.to(states)])

        first, last = (randn(shape, [torch.Generator().manual_seed(s)], "cpu", torch.float32)[0] for s in ends.seeds)
        noise = torch.stack([slerp(first, last, place.item()) for place in places])
        request = replace(
            ends,
            prompts=[ends.prompts[0]] * frames,
            negatives=[ends.negatives[0]] * frames,
            seeds=[ends.seeds[0]] * frames,
            options=replace(
                ends.options,
                prompt_embeds=between(context),
                negative_prompt_embeds=None if negative is None else between(negative),
            ),
        )
        return self._generate(request, FromNoise(shape, self.device, noise))

    def variations(
        self,
        prompt: str,
        seed: int,
        count: int = 4,
        amount: float = 0.3,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> PipelineOutput:
        """Images like that of (prompt, seed): its noise turned by a share of the way to other noise.

        amount: in 0 .. 1; 0 is the image itself, 1 has nothing of it but the prompt. The first image of the result
            is turned towards seed + 1, the next one towards seed + 2, and so on; the output tells `seed` for all.

        Raises ValueError for an amount outside 0 .. 1, a count below 1, and as a call.
        """
        if not 0 <= number("amount", amount) <= 1:
            raise ValueError(f"amount is {amount}, must be in 0 .. 1")
        if integer("count", count) < 1:
            raise ValueError(f"count is {count}, must be at least 1")
        request = self._request([prompt] * count, options | {"seed": [seed] * count})
        shape = self._latent_shape(height, width)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(count + 1)]
        base, *others = randn(shape, generators, "cpu", torch.float32)
        noise = torch.stack([slerp(base, other, amount) for other in others])
        return self._generate(request, FromNoise(shape, self.device, noise))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], clip_skip: int = 0) -> Tensor:
        """Prompts -> context [B, L, D] on the UNet's device, in its dtype; see `prompts.encode_prompts`."""
        with eval_mode(self.text_encoder):
            context = encode_prompts(self.text_encoder, self.tokenizer, prompts, clip_skip=clip_skip)
        return context.to(self.device, self.dtype)

    def encode(
        self,
        images: Sequence[Image.Image],
        *,
        height: int | None = None,
        width: int | None = None,
        tile: int | None = None,
    ) -> Tensor:
        """Images -> unit-scale latents [B, C, h, w], float32, of the posterior's mean; sizes as in image_to_image."""
        return self._encode(self._pixels(images, height, width), None, tile)

    def latent_preview(self) -> LatentPreview:
        """A linear map from latents to colours for a callback to show x0 with, fitted to this autoencoder.

        That of the folder, if `latentdiff evaluate-vae` has left one in its vae/, else a new one from 16 images of
        the embedded set, at the trained size or 256 pixels. ValueError if it does not take RGB.
        """
        if self._preview is not None:
            return self._preview
        if self.vae.config.in_channels != 3:
            raise ValueError(
                f"a preview needs an autoencoder of RGB, this one has {self.vae.config.in_channels} channels"
            )
        size = min(self._latent_shape(None, None)[1] * self.vae.config.downsampling, 256)
        images, _ = open_images(DataConfig(source=EMBEDDED, size=size, holdout=0), 3, seed=0, progress=False)
        self._preview = fit_preview(self.vae, [pixels for _, pixels in images.some(16).batches(4)])
        return self._preview

    def decode(self, latents: Tensor, *, batch_size: int | None = None, tile: int | None = None) -> list[Image.Image]:
        """Unit-scale latents [B, C, h, w] -> images, such as a callback's x0."""
        with torch.no_grad(), eval_mode(self.vae):
            return to_images(self._decode(latents, batch_size, tile))

    # ------------------------------------------------------------------------------------------------------------------
    # The steps of a generation

    @torch.no_grad()
    def _generate(self, request: Request, start: FromNoise | FromImage) -> PipelineOutput:
        """Contexts, then for one batch after the other the starting point, the sampling loop and the decoder."""
        options = request.options
        steps = len(request.levels) - 1
        size = options.batch_size or request.count
        results, images = [], []
        with eval_mode(*self._modules()):
            context, negative = self._contexts(request)
            batches = [slice(first, first + size) for first in range(0, request.count, size)]
            with tqdm(
                total=steps * len(batches),
                desc=request.sampler.name,
                unit="step",
                disable=not options.progress,
                leave=False,
            ) as bar:
                for batch in batches:
                    part = None if negative is None else negative[batch]
                    x = self._sample(request, start, batch, context[batch], part, bar)
                    pixels = self._decode(x, size, options.tile)
                    _check_pixels(pixels, self.vae, first=batch.start)
                    results.append(x)
                    images += to_images(pixels)
        return PipelineOutput(images, request.seeds, torch.cat(results))

    def _sample(
        self,
        request: Request,
        start: FromNoise | FromImage,
        batch: slice,
        context: Tensor,
        negative: Tensor | None,
        bar: tqdm,
    ) -> Tensor:
        options, levels = request.options, request.levels
        if len(levels) == 1:  # a strength of 0
            return start.latents[batch]
        generators = [torch.Generator().manual_seed(seed) for seed in request.seeds[batch]]
        denoise: Denoiser = GuidedDenoiser(
            self.unet, self.schedule, context, negative, request.guidance, clip_sample=self.vae.bounded
        )
        x, denoise = start.begin(batch, generators, denoise, levels[0])

        def after_step(step: int, timestep: float, x: Tensor, x0: Tensor) -> None:
            bar.update()
            if options.callback is not None:
                options.callback(step, timestep, x, x0)

        x = request.sampler(denoise, x, self.schedule, levels, generators, after_step, **request.sampler_options)
        if not x.isfinite().all():
            raise NonFiniteError(
                f"sampling gave latents that are not finite with {self.dtype}; use float32 or bfloat16, or less "
                "guidance"
            )
        return x

    def _contexts(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """The text states of the prompts and, with guidance, of the negative ones, of one length: [B, L, D] each."""
        given, negative = request.options.prompt_embeds, request.options.negative_prompt_embeds
        texts = [] if given is not None else list(request.prompts)
        if request.guidance.wanted and negative is None:
            texts += request.negatives
        states = self.encode_prompts(texts, request.options.clip_skip) if texts else None
        if given is None:
            given, states = states[: request.count], states[request.count :]
        given = given.to(self.device, self.dtype)
        if not request.guidance.wanted:
            return given, None
        if negative is None:
            negative = self._filled_up(states, given.shape[1], request.options.clip_skip)
        negative = negative.to(self.device, self.dtype)
        if negative.shape[1] != given.shape[1]:
            raise ValueError(
                f"prompt_embeds have {given.shape[1]} tokens, those of the negative prompt {negative.shape[1]}: give "
                "negative_prompt_embeds of the same length"
            )
        return given, negative

    def _filled_up(self, states: Tensor, tokens: int, clip_skip: int) -> Tensor:
        """With chunks of the empty prompt, as `encode_prompts` does, up to the length of given states."""
        missing, rest = divmod(tokens - states.shape[1], self.tokenizer.max_length)
        if missing < 1 or rest:
            return states
        empty = self.encode_prompts([""], clip_skip).expand(len(states), -1, -1)
        return torch.cat([states, *[empty] * missing], dim=1)

    def _encode(self, pixels: Tensor, batch_size: int | None, tile: int | None) -> Tensor:
        with torch.no_grad(), eval_mode(self.vae), torch.autocast(self.device.type, enabled=False):
            pixels = pixels.to(self.vae.device, self.vae.dtype)
            moments = encode_in_parts(self.vae, pixels, batch_size=batch_size, tile=tile)
            return self.vae.sample(moments).to(self.device, torch.float32)

    def _decode(self, latents: Tensor, batch_size: int | None, tile: int | None) -> Tensor:
        # In bf16 the flat parts of an image become uneven: never under autocast.
        with torch.autocast(latents.device.type, enabled=False):
            return decode_in_parts(
                self.vae, latents.to(self.vae.device, self.vae.dtype), batch_size=batch_size, tile=tile
            )

    def _modules(self) -> tuple[nn.Module, ...]:
        return self.vae, self.unet, self.text_encoder

    def _request(self, prompt: str | Sequence[str] | None, options: dict[str, Any]) -> Request:
        return check_request(prompt, options, self.defaults, self.schedule, self.text_encoder)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        f = self.vae.config.downsampling
        trained = (self.unet.config.sample_size or 64) * f
        height, width = or_default(height, trained), or_default(width, trained)
        self._check_size(height, width)
        return self.vae.config.latent_channels, height // f, width // f

    def _check_size(self, height: int, width: int) -> None:
        multiple = self.vae.config.downsampling * self.unet.config.downsampling
        for name, value in [("height", height), ("width", width)]:
            if integer(name, value) < multiple or value % multiple:
                raise ValueError(f"{name} is {value}, must be a multiple of {multiple}")

    def _pixels(self, images: Sequence[Image.Image], height: int | None, width: int | None) -> Tensor:
        """Images as pixels [B, C, H, W], upright, transparent ones on white."""
        images = [ImageOps.exif_transpose(one) for one in images]
        sizes = {(or_default(width, one.width), or_default(height, one.height)) for one in images}
        if len(sizes) > 1:
            raise ValueError("the images have several sizes, must be one: give height and width to crop them to")
        (size,) = sizes
        self._check_size(size[1], size[0])
        channels = self.vae.config.in_channels
        return torch.stack([to_pixels(prepare(one, size, channels, (255, 255, 255), View())) for one in images])


def _check_pixels(pixels: Tensor, vae: Autoencoder, first: int) -> None:
    """An image that is not finite, or black all over, is an error: some autoencoders overflow in half precision."""
    dtype = vae.dtype
    colours = {2: 1, 4: 3}.get(pixels.shape[1], pixels.shape[1])  # the others are opacity
    for i, image in enumerate(pixels[:, :colours], start=first):
        if not image.isfinite().all():
            raise NonFiniteError(
                f"image {i} is not finite after the autoencoder with {dtype}; move it to float32 or bfloat16"
            )
        if not vae.bounded and (image < -1 + 0.5 / 127.5).all():  # 0 in the image
            raise NonFiniteError(
                f"image {i} is black all over with {dtype}; move the pipeline to float32 or bfloat16, or use less "
                "guidance or more steps"
            )
