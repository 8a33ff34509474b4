"""The engines that run an artifact, one file each."""

RUNTIMES = {
    "endpoint": "compress.runtimes.endpoint:Endpoint",
    "onnxruntime": "compress.runtimes.onnxruntime:Onnxruntime",
    "onnxruntime-genai": "compress.runtimes.onnxruntime_genai:OnnxruntimeGenai",
    "transformers": "compress.runtimes.transformers:Transformers",
    "vllm": "compress.runtimes.vllm:Vllm",
}
"""The runtimes a recipe can name: runtime → the class whose fields are its keys."""
