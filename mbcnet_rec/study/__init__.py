"""The paper's tables and figures on a user's own data."""
