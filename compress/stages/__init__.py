"""The compression methods: what a recipe names, and the class with its settings."""

STAGES = {
    "awq": "compress.stages.quantization.awq:Awq",
    "fp8": "compress.stages.quantization.fp8:Fp8",
    "gptq": "compress.stages.quantization.gptq:Gptq",
    "hqq": "compress.stages.quantization.hqq:Hqq",
    "int8": "compress.stages.quantization.int8:Int8",
    "llmcompressor": "compress.stages.llmcompressor.stage:Llmcompressor",
    "rtn": "compress.stages.quantization.rtn:Rtn",
}
"""The stages a recipe can name: stage → the class whose fields are its keys."""
