"""The pipeline: prompt -> context -> latents -> pixels -> image."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from latentdiff import __version__
from latentdiff.config import Compile, shape_of
from latentdiff.devices import WEIGHT_TYPES, as_dtype
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.formats.headers import PNG_KEY
from latentdiff.freed_memory import freed_memory_kept
from latentdiff.images import MAX_SIDE, View, prepare, to_images, to_pixels
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.compiling import compile_network
from latentdiff.models.eval_mode import eval_mode
from latentdiff.models.pixel_space import Autoencoder
from latentdiff.models.pretrained_text import AnyTextEncoder, Tokenizer
from latentdiff.models.tiling import encode_in_parts
from latentdiff.models.unet import UNet
from latentdiff.pipeline import lora
from latentdiff.pipeline.export import export
from latentdiff.pipeline.folder import read_folder, write_folder
from latentdiff.pipeline.guidance import GuidedDenoiser
from latentdiff.pipeline.options import (
    GenerationDefaults,
    Request,
    check_latents,
    check_request,
    images_of,
    integer,
    mask_weights,
    suitable_size,
    upright,
    warn_of_far_larger,
)
from latentdiff.pipeline.preview import LatentPreview
from latentdiff.pipeline.prompts import encode_pair, encode_prompts
from latentdiff.pipeline.single_file import open_single_file
from latentdiff.pipeline.speed import AUTO, decode, lay_out
from latentdiff.pipeline.start import FromImage, FromNoise
from latentdiff.pipeline.trained_on import TrainedOn
from latentdiff.printable import listed

# Arguments of diffusers' from_pretrained for what is not here, or always so.
MEANINGLESS = ("safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder")
MEANINGLESS += ("use_safetensors", "low_cpu_mem_usage")


class NonFiniteError(ValueError):
    """Sampling gave NaN or infinity instead of an image."""


@dataclass(frozen=True)
class PipelineOutput(Sequence[Image.Image]):
    """The images of a call, in order; it is also a sequence of them.

    seeds: of each image's noise; the same call with them gives the same images.
    latents: [B, C, h, w], what was decoded.
    Each image's `info["latentdiff"]` says as JSON what it was generated with.
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
    pipeline("a blue apple", seed=3).images[0].save("apple.png")
    """

    def __init__(
        self,
        vae: Autoencoder,
        unet: UNet,
        text_encoder: AnyTextEncoder,
        tokenizer: Tokenizer,
        schedule: NoiseSchedule,
        defaults: GenerationDefaults = GenerationDefaults(),  # noqa: B008 (immutable)
        preview: LatentPreview | None = None,
        trained_on: TrainedOn | None = None,
    ) -> None:
        """With a PixelSpace as `vae` there is no autoencoder, and estimates are clipped to the range of pixels.

        preview: of the autoencoder's latents, see `preview.latent_preview`.
        trained_on: None where it is not known.
        Raises ValueError if the parts do not fit together.
        """
        _check_parts(vae, unet, text_encoder, tokenizer)
        self.vae = vae
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.defaults = defaults
        self.preview = preview
        self.trained_on = trained_on
        self.exact_decoding = False  # True: decode in the type of the weights throughout, see `speed`

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: torch.dtype | str | None = "auto",
        variant: str | None = None,
        **others: Any,
    ) -> "LatentDiffusionPipeline":
        """Open a folder in the diffusers layout, or a model id of the hub; of a LoRA's folder, its base model with it.

        dtype: of the weights and of everything that is computed. auto: weights in float32, and the decoder in the
            fastest way that costs no quality (docs/sampling.md, "Speed"). None: the weights as they are in the files.
        variant: picks files such as `diffusion_pytorch_model.fp16.safetensors`.
        others: arguments of diffusers. `torch_dtype` is `dtype`; a warning names those that mean nothing here, such as
            `safety_checker`.
        Raises ValueError if the folder or a part of it is missing, damaged or of an unsupported kind.
        """
        asked = _dtype_of(dtype, others)
        folder = Path(name_or_folder).expanduser()
        if folder.is_file():
            raise ValueError(f"{name_or_folder} is a file; open it with LatentDiffusionPipeline.from_single_file")
        if (base := lora.base_of(folder)) is not None:
            try:
                if Path(base).expanduser().is_file():
                    pipeline = cls.from_single_file(base, dtype=asked)
                else:
                    pipeline = cls.from_pretrained(base, dtype=asked, variant=variant)
            except ValueError as error:
                raise ValueError(f"{folder} holds a LoRA, whose model cannot be opened: {error}") from None
            pipeline.load_lora_weights(folder)
            pipeline.trained_on = TrainedOn.load(folder) or pipeline.trained_on
            return pipeline
        stored = None if isinstance(asked, str) else asked
        return cls(**read_folder(str(name_or_folder), stored, variant)._asdict())._opened_as(asked)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = "auto",
        prediction_type: str | None = None,
        **others: Any,
    ) -> "LatentDiffusionPipeline":
        """Open Stable Diffusion's single file (.safetensors), of the structure of Stable Diffusion 1 or 2.

        prediction_type: what its UNet predicts. None: what the file says, which few do; else epsilon for Stable
            Diffusion 1 and v_prediction for 2.
        dtype, others: as in `from_pretrained`.
        Raises ValueError if the file is damaged, of another kind or another model, or not whole.
        """
        asked = _dtype_of(dtype, others)
        stored = None if isinstance(asked, str) else asked
        pipeline = cls(**open_single_file(Path(path).expanduser(), stored, prediction_type)._asdict())
        return pipeline._opened_as(asked)

    def save_single_file(self, path: str | Path) -> None:
        """Write Stable Diffusion's single file, a new one.

        Raises ValueError if there is something at `path`, or no single file names the model; the message says why.
        """
        export(self, Path(path), "single-file")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the diffusers layout, safetensors only, in place of an old pipeline and in one step.

        Other files in the folder stay. Raises ValueError if it holds a single model, such as an autoencoder.
        """
        write_folder(self, Path(folder))

    def load_lora_weights(
        self,
        name: str | Path,
        adapter_name: str | None = None,
        scale: float = 1.0,
        *,
        weight_name: str | None = None,
    ) -> str:
        """Add a LoRA to the networks, beside those that are loaded; returns its name.

        name: a .safetensors file of diffusers or kohya's scripts, a folder, or a hub id. weight_name: which of several
            files. adapter_name: None: the folder's or file's own. scale: 1 is as trained, 0 without effect.
        Raises ValueError if the file is no LoRA of this model, damaged, or of a kind that is not supported.
        """
        return lora.load(self, name, adapter_name, scale, weight_name)

    def set_adapters(self, names: str | Sequence[str], scales: float | Sequence[float] = 1.0) -> None:
        """Let these LoRAs act, each times its scale, and no others. ValueError for one that is not loaded."""
        names = [names] if isinstance(names, str) else list(names)
        scales = [scales] * len(names) if isinstance(scales, int | float) else list(scales)
        if len(scales) != len(names):
            raise ValueError(f"there are {len(scales)} scales for {len(names)} adapters")
        lora.choose(self, names, scales)

    @property
    def adapters(self) -> dict[str, float]:
        """The LoRAs that are loaded and their scales; 0: it does not act."""
        return lora.scales_of(self)

    def fuse_lora(self) -> None:
        """Make the LoRAs that act part of the weights, with their scales, and forget them all.

        Then the pipeline can be saved, and is as fast as without. ValueError if none is loaded.
        """
        lora.fuse_all(self)

    def unload_lora_weights(self) -> None:
        """Remove all LoRAs: the weights are what they were. ValueError if none is loaded."""
        lora.remove_all(self)

    def to(
        self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | str | None = None
    ) -> "LatentDiffusionPipeline":
        """Move the models; returns the pipeline itself. dtype: as in `from_pretrained`, also as the only argument."""
        if isinstance(device, torch.dtype) or (isinstance(device, str) and device in WEIGHT_TYPES):
            if dtype is not None:
                raise ValueError(f"device is {device!r}, which is a type: give the type once")
            device, dtype = None, device
        dtype = as_dtype(dtype)
        self.exact_decoding |= dtype is not None
        for module in self._modules():
            module.to(device=device, dtype=dtype)
        return self

    def compile(self, how: Compile = "blocks", **options: Any) -> "LatentDiffusionPipeline":
        """Compile for many images of one size and number; returns the pipeline.

        blocks: those of the UNet and the decoder, seconds for each kind. step: the UNet as one graph, minutes, on an
        NVIDIA GPU a CUDA graph; and the decoder's blocks. options: of torch.compile, for the UNet.
        """
        compile_network(self.unet, how, cuda_graphs=self.device.type == "cuda", **options)
        if isinstance(self.vae, AutoencoderKL) and how != "off":
            compile_network(self.vae.decoder, "blocks", **{k: v for k, v in options.items() if k == "backend"})
        return self

    @property
    def device(self) -> torch.device:
        """The UNet's device."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the UNet computes."""
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
        request = self.request(prompt, options)
        shape = self.latent_shape(height, width)
        if latents is not None:
            check_latents(latents, (request.count, *shape))
        return self.generate(request, FromNoise(shape, self.device, latents))

    def check(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> None:
        """Raise the ValueError that a call with these arguments would raise; compute nothing."""
        self.request(prompt, options)
        self.latent_shape(height, width)

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
        """Change images by a prompt: noise them part of the way and denoise from there (Meng et al. 2022, SDEdit).

        image: one for all, or one per prompt; scaled and cropped to height x width if given. Else it keeps its size;
            one that the network can't take, or with more than four times the pixels it was trained on, is scaled to
            the trained number of pixels, with a warning.
        strength: in 0 .. 1, the fraction of the steps that is run; 0 only encodes and decodes.
        options: see `Options`.

        Raises ValueError for a strength outside 0 .. 1, another number of images than prompts, and as a call.
        """
        request = self.request(prompt, options).after(strength)
        pixels = self._pixels(images_of("image", image, request), height, width, fit=True)
        latents = self._encode(pixels, request.options.batch_size, request.options.tile)
        return self.generate(request, FromImage(latents))

    def inpaint(
        self,
        prompt: str | Sequence[str] | None,
        image: Image.Image | Sequence[Image.Image],
        mask: Image.Image | Sequence[Image.Image],
        strength: float = 1.0,
        **options: Any,
    ) -> PipelineOutput:
        """Repaint the white part of a mask; pixels where it is black stay exactly as they are.

        mask: of the image's size; grey mixes the two, transparent parts are black. Every latent whose area touches the
            mask is repainted; the others are kept at the image's own at every step, which the network sees (as in
            Lugmayr et al. 2022, without resampling).
        strength: as in `image_to_image`; at 1 the masked part starts from pure noise.
        image, options: as in `image_to_image`, but the size is always the image's own.

        Raises ValueError for a mask of another size or without any white, and as `image_to_image`.
        """
        request = self.request(prompt, options).after(strength)
        pixels = self._pixels(images_of("image", image, request), None, None)
        warn_of_far_larger((pixels.shape[3], pixels.shape[2]), self._trained_size)
        weights = mask_weights(mask, pixels, request)
        latent_mask = (F.max_pool2d(weights, self.vae.config.downsampling) > 0).float()
        known = self._encode(pixels, request.options.batch_size, request.options.tile)
        output = self.generate(request, FromImage(known, latent_mask.to(known.device), from_noise=strength == 1))
        images = []
        for new, old, alpha in zip(output.images, to_images(pixels), to_images(weights * 2 - 1), strict=True):
            images.append(Image.composite(new, old, alpha))
            images[-1].info |= new.info
        return replace(output, images=images)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], clip_skip: int = 0, weights: bool = True) -> Tensor:
        """Prompts -> context [B, L, D] on the UNet's device, in its dtype; see `prompts.encode_prompts`."""
        with eval_mode(self.text_encoder):
            context = encode_prompts(self.text_encoder, self.tokenizer, prompts, clip_skip=clip_skip, weights=weights)
        return context.to(self.device, self.dtype)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> context [B, L, D] for `prompt_embeds`, read as in training: one row each, without weights.

        A caption that is too long is cut, with a warning.
        """
        with eval_mode(self.text_encoder):
            context = self.text_encoder(self.tokenizer(captions).to(next(self.text_encoder.parameters()).device))
        return context.to(self.device, self.dtype)

    def encode(
        self,
        images: Sequence[Image.Image],
        *,
        height: int | None = None,
        width: int | None = None,
        tile: int | None = None,
    ) -> Tensor:
        """Images -> unit-scale latents [B, C, h, w], float32, of the posterior mean; sizes as in image_to_image."""
        return self._encode(self._pixels(images, height, width, fit=True), None, tile)

    def decode(self, latents: Tensor, *, batch_size: int | None = None, tile: int | None = None) -> list[Image.Image]:
        """Unit-scale latents [B, C, h, w] -> images; for example a callback's x0."""
        with torch.no_grad(), eval_mode(self.vae), freed_memory_kept(self.vae.device):
            return to_images(self._decode(latents, batch_size, tile))

    # ------------------------------------------------------------------------------------------------------------------
    # The steps of a generation

    def request(self, prompt: str | Sequence[str] | None, options: dict[str, Any]) -> Request:
        """The checked request of a prompt and options; computes nothing. ValueError as a call."""
        return check_request(prompt, options, self.defaults, self.schedule, self.text_encoder)

    def contexts(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Context of the prompts and, with guidance, of the negative prompts, of one length: [B, L, D] each."""
        context, negative = encode_pair(self.encode_prompts, request)
        context = context.to(self.device, self.dtype)
        return context, None if negative is None else negative.to(self.device, self.dtype)

    @torch.no_grad()
    def generate(self, request: Request, start: FromNoise | FromImage) -> PipelineOutput:
        """The images of a request, one batch after another."""
        lay_out(self.unet)
        results, images = [], []
        # 1. Prompts -> context [B, L, D]
        context, negative = self.contexts(request)
        if self.trained_on is not None:
            self.trained_on.warn(request, rows=context.shape[1] // self.tokenizer.max_length)
        with eval_mode(*self._modules()), freed_memory_kept(self.device), request.progress_bar() as bar:
            for batch in request.batches():
                # 2. The guided denoiser: (x, noise level) -> x0
                generators = [torch.Generator().manual_seed(seed) for seed in request.seeds[batch]]
                part = None if negative is None else negative[batch]
                clip = self.vae.is_pixel_space
                denoise = GuidedDenoiser(
                    self.unet, self.schedule, context[batch], part, request.guidance, clip, request.levels[:-1]
                )
                # 3. Where to start: noise, or a noised image
                x, step = start.begin(batch, generators, denoise, request.levels)
                # 4. The sampler: noise -> latents
                x = request.sample(step, x, self.schedule, generators, bar)
                _check_sampled(x, self.dtype)
                # 5. Latents -> pixels -> images
                pixels = self._decode(x, request.batch_size, request.options.tile)
                _check_pixels(pixels, self.vae, first=batch.start)
                results.append(x)
                images += to_images(pixels)
        model: dict[str, Any] = {"model": self.fingerprint(), "latentdiff": __version__}
        if adapters := self.adapters:
            model["lora"] = adapters
        for i, image in enumerate(images):
            image.info[PNG_KEY] = json.dumps(request.description(i) | model, ensure_ascii=False)
        return PipelineOutput(images, request.seeds, torch.cat(results))

    def fingerprint(self) -> str:
        """16 hex digits of the UNet's first and last weights, which every training changes."""
        digest = hashlib.blake2b(digest_size=8)
        for layer in (self.unet.conv_in, self.unet.conv_out):
            digest.update(layer.weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """[C, h, w] of the latents of an image, by default of the trained size; ValueError if it does not divide."""
        f = self.vae.config.downsampling
        trained_width, trained_height = self._trained_size
        height = trained_height if height is None else height
        width = trained_width if width is None else width
        self._check_size(height, width)
        return self.vae.config.latent_channels, height // f, width // f

    def _check_size(self, height: int, width: int) -> None:
        multiple = self._multiple
        for name, value in [("height", height), ("width", width)]:
            if not multiple <= integer(name, value) <= MAX_SIDE or value % multiple:
                raise ValueError(f"{name} is {value}, must be a multiple of {multiple} up to {MAX_SIDE}")

    @property
    def _trained_size(self) -> tuple[int, int]:
        """Size (width, height) of the training images, pixels."""
        f = self.vae.config.downsampling
        height, width = shape_of(self.unet.config.sample_size or 64)
        return width * f, height * f

    @property
    def _multiple(self) -> int:
        """Of which a height and a width in pixels must be multiples."""
        return self.vae.config.downsampling * self.unet.config.downsampling

    def _pixels(
        self, images: Sequence[Image.Image], height: int | None, width: int | None, *, fit: bool = False
    ) -> Tensor:
        """Images as pixels [B, C, H, W], upright, transparent ones on white. fit: to a size that suits the network."""
        images, size = upright(images, height, width)
        if fit and height is None and width is None:
            size = suitable_size(size, self._trained_size, self._multiple)
        self._check_size(size[1], size[0])
        channels = self.vae.config.in_channels
        return torch.stack([to_pixels(prepare(one, size, channels, (255, 255, 255), View())) for one in images])

    def _encode(self, pixels: Tensor, batch_size: int | None, tile: int | None) -> Tensor:
        autocast_off = torch.autocast(self.device.type, enabled=False)
        with torch.no_grad(), eval_mode(self.vae), autocast_off, freed_memory_kept(self.vae.device):
            pixels = pixels.to(self.vae.device, self.vae.dtype)
            moments = encode_in_parts(self.vae, pixels, batch_size=batch_size, tile=tile)
            return self.vae.sample(moments).to(self.device, torch.float32)

    def _decode(self, latents: Tensor, batch_size: int | None, tile: int | None) -> Tensor:
        return decode(self.vae, latents, batch_size, tile, exact=self.exact_decoding)

    def _opened_as(self, dtype: torch.dtype | Literal["auto"] | None) -> "LatentDiffusionPipeline":
        """What is left to do for a type once the weights are there, of that type or for auto of the files'."""
        if isinstance(dtype, str):
            for module in self._modules():
                module.float()
        self.exact_decoding = isinstance(dtype, torch.dtype)
        return self

    def _modules(self) -> tuple[nn.Module, ...]:
        return self.vae, self.unet, self.text_encoder


def _dtype_of(dtype: torch.dtype | str | None, others: dict[str, Any]) -> torch.dtype | Literal["auto"] | None:
    """The type, `AUTO` or None that a call in the words of diffusers asks for.

    TypeError for an argument that nobody knows.
    """
    theirs = others.get("torch_dtype")
    if theirs is not None:
        if dtype != AUTO:
            raise ValueError(f"dtype is {dtype} and torch_dtype is {theirs}: give one of them")
        dtype = theirs
    if unknown := [name for name in others if name not in (*MEANINGLESS, "torch_dtype")]:
        raise TypeError(f"unknown argument {unknown[0]!r}; known are dtype, variant and prediction_type")
    if ignored := [name for name in others if name in MEANINGLESS]:
        warnings.warn(f"ignored, as it means nothing here: {listed(ignored)}", stacklevel=3)
    return "auto" if dtype == AUTO else as_dtype(dtype)


def _check_parts(vae: Autoencoder, unet: UNet, text_encoder: AnyTextEncoder, tokenizer: Tokenizer) -> None:
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


def _check_sampled(latents: Tensor, dtype: torch.dtype) -> None:
    if not latents.isfinite().all():
        raise NonFiniteError(
            f"sampling gave latents that are not finite with {dtype}; use float32 or bfloat16, or less guidance"
        )


def _check_pixels(pixels: Tensor, vae: Autoencoder, first: int) -> None:
    """Raise NonFiniteError for an image that is not finite, or all black: some autoencoders overflow in float16."""
    dtype = vae.dtype
    colours = {2: 1, 4: 3}.get(pixels.shape[1], pixels.shape[1])  # the remaining channel is opacity
    for i, image in enumerate(pixels[:, :colours], start=first):
        if not image.isfinite().all():
            raise NonFiniteError(
                f"image {i} is not finite after the autoencoder with {dtype}; move it to float32 or bfloat16"
            )
        if not vae.is_pixel_space and (image < -1 + 0.5 / 127.5).all():  # 0 in the image
            raise NonFiniteError(
                f"image {i} is black all over with {dtype}; move the pipeline to float32 or bfloat16, or use less "
                "guidance or more steps"
            )
