"""The Hugging Face Hub: models by their ids, their files, and what went wrong on the way.

huggingface_hub does the talking, so that its settings hold: HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE, proxies. It is imported when an id is used, and never before.
"""
