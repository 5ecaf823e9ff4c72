//! The frame of a page that the program writes: it needs nothing beside itself, and follows the
//! reader's light or dark scheme.

use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = "
  :root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --pale: #59636e; --line: #d8dee4; --bar: #0072b2 }
  @media (prefers-color-scheme: dark) {
    :root { --paper: #0d1117; --ink: #f0f6fc; --pale: #9198a1; --line: #30363d; --bar: #4ba3dc }
  }
  body { max-width: 900px; margin: 2em auto; padding: 0 1em; background: var(--paper); color: var(--ink);
    font: 16px/1.5 system-ui, sans-serif }
  h1 { font-size: 1.5em; margin-bottom: 0; overflow-wrap: anywhere } h2 { font-size: 1.2em; margin-top: 2em }
  h3 { font-size: 1em; color: var(--pale) }
  p { color: var(--pale) }
  svg { width: 100%; height: auto }
  .wide { overflow-x: auto }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
  th, td { padding: 0.3em 0.8em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
  th:first-child { text-align: left } th { font-weight: normal; color: var(--pale) }
  .total th, .total td { font-weight: 600; color: var(--ink) }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: 1em }
  .bars { margin: 1em 0 } .bars span { color: var(--pale) }
  .bar { display: flex; align-items: center; gap: 0.6em; margin: 2px 0; white-space: nowrap }
  .bar i { height: 1.2em; background: var(--bar); border-radius: 2px; flex: none } .bar.pale i { background: var(--pale) }
";

/// A page with this title and content.
pub fn html(title: &str, content: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body { (content) }
        }
    };
    page.into_string()
}
