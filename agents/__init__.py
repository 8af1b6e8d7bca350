"""Episodes: a policy and an environment become an exact token trajectory. Imports no torch, ray or vllm."""
