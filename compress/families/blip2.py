"""BLIP-2 (arXiv 2301.12597) with OPT as its decoder: a Q-Former turns an image into a few embeddings before the prompt."""

from compress.families.family import Family, ScalePair

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set before, after = ' ', '\\n' -%}
{%- elif loop.first -%}
{%- set before, after = '</s>Question: ', ' Answer:' -%}
{%- else -%}
{%- set before, after = 'Question: ', ' Answer:' -%}
{%- endif -%}
{{- before -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- after -}}
{%- endfor -%}
"""
"""The prompt of the published examples; the processor puts the image's tokens before it, and an answer ends with its line."""

BLIP2 = Family(
    name="blip-2",
    model_type="blip-2",
    architecture="Blip2ForConditionalGeneration",
    renames=(),
    vision=("vision_model", "qformer", "language_projection"),
    projector=("qformer", "language_projection"),
    vision_blocks=("vision_model.encoder.layers",),
    embeddings="language_model.model.decoder.embed_tokens",
    blocks="language_model.model.decoder.layers",
    head="language_model.lm_head",
    image_token_keys=("image_token_index", "image_token_id"),
    scale_pairs=(
        ScalePair("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScalePair("self_attn.v_proj", ("self_attn.out_proj",)),
        ScalePair("final_layer_norm", ("fc1",)),
        ScalePair("fc1", ("fc2",)),  # between them is a ReLU, which a positive scale passes
    ),
    vision_scale_pairs=(ScalePair("layer_norm1", ("self_attn.qkv",)), ScalePair("layer_norm2", ("mlp.fc1",))),
    single_image=True,
    text_model="language_model",
    chat_template=_CHAT_TEMPLATE,
    served_names=((r"^vision_model\.", "."),),
    served_unquantized=("qformer", "language_projection"),
    requires=(
        ("text_config.model_type", "opt"),
        # with the norm after the block (OPT-350m) the scale pairs do not hold
        ("text_config.do_layer_norm_before", True),
        # the pair fc1 → fc2 holds for a ReLU alone
        ("text_config.activation_function", "relu"),
    ),
    defaults=(("max_position_embeddings", 2048),),
    tied_by=("text_config.tie_word_embeddings",),
    tied_default=True,
)
