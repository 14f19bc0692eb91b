/** The version of the pack, as in pyproject.toml. */
export const VERSION = "0.1.0";
