"""Worlds to act in: text environments, their tasks, tools and sandboxes. Imports no torch, ray or vllm."""

from envs.checker import check_env
from envs.env import Env, Text
from envs.errors import CodeworldError, InfraError, SandboxDead, Unsupported
from envs.registration import make, register, registered
from envs.task import Task, load_tasks, save_tasks

__all__ = [
    "CodeworldError",
    "Env",
    "InfraError",
    "SandboxDead",
    "Task",
    "Text",
    "Unsupported",
    "check_env",
    "load_tasks",
    "make",
    "register",
    "registered",
    "save_tasks",
]
