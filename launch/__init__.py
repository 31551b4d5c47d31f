"""Components that torchx launches. They name modules as strings and import nothing of ours."""
