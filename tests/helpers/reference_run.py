"""An independent reference of reuse: plain attention whose probabilities are kept in fp32, step by step."""

from attnreuse.binding.processors import attention_layers


class ReferenceAttnProcessor:
    """``AttnProcessor`` that keeps its probabilities at steps that do not reuse, and applies them at those that do."""

    def __init__(self, state, row, keep_last_rows):
        self.state, self.row, self.keep_last_rows, self.kept = state, row, keep_last_rows, {}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *a, **k):
        residual = hidden_states
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        step, call = divmod(self.state["call"], self.state["calls"])
        value = attn.head_to_batch_dim(attn.to_v(context))
        if not self.row[step]:
            query, key = (attn.head_to_batch_dim(f(x)) for f, x in ((attn.to_q, hidden_states), (attn.to_k, context)))
            mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(hidden_states))
            self.kept[call] = attn.get_attention_scores(query, key, mask).float()
        kept = self.kept[call][-len(value) :] if self.keep_last_rows else self.kept[call]
        out = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim((kept @ value.float()).to(value.dtype))))
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


def reference(unet, policy, run, calls=1, layers="self", keep_last_rows=False):
    """What `run()` gives when `unet`, called `calls` times a step, reuses as `policy` says."""
    state, before = {"call": -1, "calls": calls}, {}
    hook = unet.register_forward_pre_hook(lambda *a: state.__setitem__("call", state["call"] + 1))
    try:
        for name, attn in attention_layers(unet).items():
            if layers in ("all", "cross" if attn.is_cross_attention else "self"):
                before[name] = attn.processor
                attn.set_processor(ReferenceAttnProcessor(state, policy.row(name), keep_last_rows))
        return run()
    finally:
        hook.remove()
        for name, attn in attention_layers(unet).items():
            if name in before:
                attn.set_processor(before[name])
