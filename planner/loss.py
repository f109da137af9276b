"""What the loss needs: logits, whole or in pieces, the gradients made with them, and the hidden states around it."""

from __future__ import annotations

from .architecture import Architecture
from .hardware import GIB
from .methods import METHODS
from .settings import Settings
from .stacks import Stack
from .storage import Fixed

#: Bytes per logit of a tile in forward and backward where torch operations fold it instead of a Triton kernel: their
#: fp32 temporaries (measured with TRL 1.16 on the CPU).
_CPU_TILE = (29.0, 45.0)


def tail_bytes(stack: Stack, settings: Settings) -> float:
    """Per feature and token: last hidden states, their norm's input in fp32 and normed copy, the embedding's output."""
    if stack.loss == "rows":  # the normed states are gone, but for their gradient, when it comes to the logits
        return 2.0 * settings.compute_bytes
    return 10.0 if settings.compute_bytes == 2 else 16.0


def loss_bytes(
    architecture: Architecture, settings: Settings, stack: Stack, fixed: Fixed, *, cpu: bool = False
) -> tuple[float, float, float]:
    """Bytes of the loss in forward, in backward, and of the head's gradient while it is made."""
    vocab, hidden, tokens = architecture.vocab, architecture.hidden, settings.graded
    c = settings.compute_bytes
    if METHODS[settings.method].scalar_head:
        return 0.0, 0.0, 0.0
    if settings.beside.teacher is not None:
        head = (4.0 + settings.weight_bytes) * vocab * hidden if settings.tuning == "full" else 0.0
        return settings.beside.teacher.loss_bytes(architecture, c, tokens, head_bytes=head), 0.0, 0.0
    if stack.loss == "logits":
        return stack.logit_forward * vocab * tokens, stack.logit_backward * vocab * tokens, fixed.head_gradient
    if stack.loss == "rows":
        chunk = _budgeted(tokens, vocab, stack.chunk_gib) if stack.chunk_gib else min(tokens, stack.chunk_tokens)
        made, piece = c * hidden * tokens, chunk * ((stack.logit_forward or c) * vocab + (c + 4) * hidden)
        copied = 2.0 if stack.chunk_gib else 1.0  # finetui scales what it made in place
        if settings.tuning != "full":
            return piece + made, copied * made, 0.0
        width = settings.weight_bytes
        if not stack.chunk_gib and width == c == 2:
            forward = made + _waiting(vocab, hidden, tokens, chunk)
        else:
            # The head's gradient in fp32 and then in its own width; mixed precision multiplies with a 16-bit copy.
            head = 4.0 + (width if width != 4 else c if c != 4 else 0)
            forward = piece + made + head * vocab * hidden
        return max(forward, copied * (made + width * vocab * hidden)), 0.0, 0.0
    if stack.loss == "tiles":
        tile = min(tokens, stack.chunk_tokens) * min(vocab, stack.tile_words)
        forward, backward = _CPU_TILE if cpu else (c, c)
        selected = c * hidden * tokens  # the hidden states of the trained positions, gathered
        head = (4 + settings.weight_bytes) * vocab * hidden if settings.tuning == "full" else 0.0
        return forward * tile + selected, backward * tile + selected + (4 + c) * hidden * tokens, head
    chunk = stack.chunk_tokens or _liger_chunk(tokens, vocab, hidden)
    whole = settings.tuning == "full" and stack.logit_held_full
    logits, held = vocab * chunk, (stack.logit_held_full if whole else stack.logit_held) * vocab * tokens
    backward = stack.logit_backward * logits + held + c * hidden * tokens
    return stack.logit_forward * logits + held, backward, fixed.head_gradient


def _waiting(vocab: int, hidden: int, tokens: int, chunk: int) -> float:
    """Bytes of the loss of finetui's kernel where the head is trained in 16 bits, beside the gradient of hidden states.

    The 16-bit gradients of logits wait for one product: all of them where they take no more than sums in fp32 would,
    else as many as the head is wide (``kernels/linear_cross_entropy.py``).
    """
    rows = tokens if tokens <= 2 * hidden + chunk else min(tokens, max(chunk, hidden))
    logits, part, head = 2.0 * rows * vocab, 2.0 * rows * hidden, 2.0 * vocab * hidden
    if rows == tokens:
        return logits + part + max(head + part, 4 * part, 4.0 * hidden * min(tokens, chunk))
    return 2 * head + logits + max(head, part + 4.0 * hidden * chunk)


def _budgeted(tokens: int, vocab: int, gib: float) -> int:
    """Tokens in the largest chunk of Unsloth's fused cross-entropy: those of which 16 bytes per logit fit
    (``unsloth_zoo/fused_losses/cross_entropy_loss.py``).

    It cuts what does not fit into a multiple of four, so a little more than fits makes far smaller chunks; but the
    peak of a run is that of its worst batch, and some of its batches are shorter than its longest.
    """
    return min(tokens, int(gib * GIB / (16 * vocab)))


def _liger_chunk(tokens: int, vocab: int, hidden: int) -> int:
    """Tokens per chunk of Liger's fused linear cross-entropy: next_pow2(T / ceil(V / H))."""
    return 1 << max(0, (max(1, -(-tokens // -(-vocab // hidden))) - 1).bit_length())
