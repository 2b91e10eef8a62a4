//! A comparison as a self-contained page: no script, font, picture or external address.
//!
//! Text from results is escaped on insertion (by [`maud`], except for this program's drawings and
//! styles), and the page's content security policy forbids everything else.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::Comparison;
use super::comparison::{Compared, ResultKind};
use super::detail;
use super::measured;
use super::plot::{Colour, Plot, Rgb, Tint};
use super::plots;
use super::table::{Table, tables};
use crate::text::clean;

/// Nothing is loaded or executed.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// Minimum characters of a cell for a wide column.
const WIDE: usize = 40;

/// The page, with the plots in it.
pub(crate) fn page(comparison: &Comparison) -> String {
    let models = &comparison.models;
    let usable: Vec<&Compared> = models.iter().filter(|model| !model.is_unusable()).collect();
    let title = match usable.as_slice() {
        [model] => format!("Outlier features of {}", model.label),
        _ => format!("Outlier features in {} results", usable.len()),
    };
    let tables = tables(comparison);
    let table = |name: &str| tables.iter().find(|table| table.name == name).map_or_else(|| html! {}, rendered);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                title { (shown(&title)) }
                style { (PreEscaped(style())) }
            }
            body {
                a.skip href="#main" { "Skip to the figures" }
                header {
                    h1 { (shown(&title)) }
                    @if let Some(cost) = measured::cost(comparison) { p.answer id="cost-answer" { (shown(&cost)) } }
                    p.answer id="answer" { (shown(&comparison.answer())) }
                    p.note { "Hidden dimensions that carry values of large magnitude at the norms' outputs, in many layers and at many positions \
                         (Dettmers et al. 2022, LLM.int8()), counted in every way that is in use." }
                }
                nav aria-label="Contents" { (contents(comparison)) }
                main id="main" {
                    (unusable(models))
                    section id="figures" { h2 { "Across models" } (across(comparison)) }
                    section id="models" { h2 { "Models and counts" } (table("models")) (table("measured")) (table("counts")) (table("catalogue")) }
                    section id="differences" { h2 { "Differences that are only definition or provenance" } (table("differences")) }
                    @for model in models { (of_model(model)) }
                    section id="published" {
                        h2 { "What others published" }
                        @for published in comparison.published { (table(&published.name)) }
                    }
                }
                footer { p.note { "Made by outliers " (env!("CARGO_PKG_VERSION")) " from the folders named above." } }
            }
        }
    }
    .into_string()
}

/// Removes terminal controls and text-direction characters.
fn shown(text: &str) -> String {
    clean(text.as_bytes(), 2000)
}

/// The page's styles. Each colour has a value for light and dark mode, for text and drawings.
fn style() -> String {
    let name = |colour: Colour| match colour {
        Colour::Heat(step) => format!("heat-{step}"),
        named => format!("{named:?}").to_lowercase(),
    };
    let hex = |[r, g, b]: Rgb| format!("#{r:02X}{g:02X}{b:02X}");
    let values = |of: fn(&Tint) -> Rgb| {
        Colour::ALL.iter().map(|colour| format!("--{}:{};", name(colour.0), hex(of(colour)))).collect::<String>()
    };
    let (light, dark) = (values(|colour| colour.1), values(|colour| colour.2));
    let mut style = format!(
        ":root{{color-scheme:light dark;{light}}}\n@media print{{:root{{color-scheme:light}}}}\n\
         @media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    );
    for (colour, light, _) in Colour::ALL {
        let (name, light) = (name(colour), hex(light));
        style +=
            &format!("svg [fill=\"{light}\"]{{fill:var(--{name})}}svg [stroke=\"{light}\"]{{stroke:var(--{name})}}\n");
    }
    style + include_str!("page.css")
}

fn contents(comparison: &Comparison) -> Markup {
    html! {
        ul {
            li { a href="#figures" { "Across models" } }
            li { a href="#models" { "Models and counts" } }
            li { a href="#differences" { "Definitions and provenance" } }
            @for model in comparison.models.iter().filter(|model| model.run.is_some()) {
                li { a href={ "#model-" (model.number) } { (model.number) ". " (shown(&model.label)) } }
            }
            li { a href="#published" { "Published tables" } }
        }
    }
}

/// Results without figures come first, so that missing points are noticed.
fn unusable(models: &[Compared]) -> Markup {
    html! {
        @for model in models {
            @if let ResultKind::Unusable(why) = &model.standing {
                p.warning role="note" { strong { "No figures of " (shown(&model.folder)) ": " } (shown(why)) }
            }
        }
    }
}

fn across(comparison: &Comparison) -> Markup {
    let all = plots::across(comparison);
    html! {
        p { "Numbers are the models of the table below, letters the rows of the published tables. Figures by the predecessor's definition are not \
             numbers of distinct features, and stand in plots of their own." }
        (grid(&all))
    }
}

fn of_model(model: &Compared) -> Markup {
    let Some(run) = model.run.as_deref() else { return html! {} };
    html! {
        section id={ "model-" (model.number) } {
            h2 { (model.number) ". " (shown(&model.label)) }
            (facts(model))
            (grid(&plots::of_model(model)))
            @for table in detail::tables(&format!("model{}", model.number), run) { (rendered(&table)) }
        }
    }
}

fn facts(model: &Compared) -> Markup {
    let Some(metadata) = model.provenance.as_deref() else { return html! {} };
    let stored: Vec<String> = metadata.model.stored_dtypes.keys().cloned().collect();
    let others = model.results().map(detail::other_sites).unwrap_or_default();
    let facts = [
        ("model", metadata.model.name.clone()),
        ("revision", metadata.model.revision.clone().unwrap_or_else(|| "a folder".to_owned())),
        ("architecture", metadata.model.architecture.clone()),
        ("precision", format!("stored as {}, computed in {}", stored.join(", "), metadata.compute_dtype)),
        ("text", format!("{}, SHA-256 {}", metadata.corpus.source, metadata.corpus.sha256)),
        ("token ids", format!("SHA-256 {}", metadata.corpus.token_ids_sha256)),
        ("job", format!("SHA-256 {}", model.job_sha256.as_deref().unwrap_or_default())),
        ("studied besides norm outputs", if others.is_empty() { "nothing".to_owned() } else { others }),
        ("folder", model.folder.clone()),
    ];
    html! { dl.facts { @for (name, value) in facts { dt { (name) } dd { (shown(&value)) } } } }
}

fn grid(plots: &[Plot]) -> Markup {
    html! {
        div.plots {
            @for plot in plots {
                figure id=(plot.name) {
                    (PreEscaped(&plot.svg))
                    figcaption { strong { (plot.title) } (plot.description) }
                }
            }
        }
    }
}

fn rendered(table: &Table) -> Markup {
    // The row's header: the first text column that is not a key.
    let head = table.columns.iter().position(|column| !column.numeric && column.name != "key").unwrap_or(0);
    let class = |column: usize, cell: &str| {
        let numeric = table.columns[column].numeric;
        if numeric { Some("n") } else { (cell.chars().count() > WIDE).then_some("wide") }
    };
    if table.rows.is_empty() {
        return html! { h3 id={ "table-" (table.name) } { (shown(&table.title)) } (notes(table)) };
    }
    // Groups the rows of one model.
    let begins = |row: usize| row > 0 && grouped(table) && table.rows[row][0] != table.rows[row - 1][0];
    html! {
        div.scroll tabindex="0" role="region" aria-label=(shown(&table.title)) {
            table id={ "table-" (table.name) } {
                caption { (shown(&table.title)) }
                thead { tr {
                    @for column in &table.columns { th scope="col" class=[column.numeric.then_some("n")] { (column.name) } }
                } }
                tbody {
                    @for (number, row) in table.rows.iter().enumerate() {
                        tr class=[begins(number).then_some("next")] {
                            @for (column, cell) in row.iter().enumerate() {
                                @if column == head { th scope="row" class=[class(column, cell)] { (shown(cell)) } }
                                @else { td class=[class(column, cell)] { (shown(cell)) } }
                            }
                        }
                    }
                }
            }
        }
        (notes(table))
    }
}

fn notes(table: &Table) -> Markup {
    html! { @for note in &table.notes { p.note { (shown(note)) } } }
}

/// Whether several rows have the same first cell.
fn grouped(table: &Table) -> bool {
    table.rows.windows(2).any(|pair| pair[0][0] == pair[1][0])
}

#[cfg(test)]
mod tests {
    use outliers_protocol::files;
    use serde_json::json;

    use super::super::fixture::{change, copy, rename};
    use super::super::folder::read_all;
    use super::*;

    const EVIL: &str = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\u{202e}";

    fn page_of(model: &str) -> String {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("mixture", &home.path().join("a")), model);
        copy("dense", &home.path().join("b"));
        let broken = copy("dense", &home.path().join("c"));
        std::fs::write(broken.join("results.json"), "{}").unwrap();
        page(&Comparison::of(read_all(&[home.path().to_owned()], true).unwrap()))
    }

    #[test]
    fn names_are_escaped_everywhere() {
        let page = page_of(EVIL);
        for forbidden in
            ["<script", "<img", "\u{202e}", "alert(1)<", "http:", "https:", "url(", "@import", "<link", "<iframe"]
        {
            // The namespace of drawings is not loaded.
            let page = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
            assert!(!page.contains(forbidden), "{forbidden}");
        }
        assert!(page.contains("&lt;script&gt;alert(1)"));
    }

    #[test]
    fn page_shows_every_measurement() {
        let page = page_of("allenai/OLMoE-1B-7B-0125");
        for id in [
            "table-models",
            "table-counts",
            "table-differences",
            "table-paper",
            "table-predecessor",
            "table-model1-features",
            "table-model1-ladder",
            "table-model1-shares",
            "table-model1-massive-table",
            "table-model1-super-experts",
            "table-model1-routers-table",
            "model1-magnitudes",
            "model1-features",
            "model1-massive",
            "model1-experts",
            "model1-routers",
            "model2-features",
            "affected-parameters-paper",
            "affected-perplexity-paper",
            "count-perplexity-paper",
            "magnitude-parameters",
        ] {
            assert_eq!(page.matches(&format!(" id=\"{id}\"")).count(), 1, "{id}");
        }
        let at = |id: &str| page.find(&format!(" id=\"{id}\"")).unwrap();
        assert!(at("answer") < at("figures") && at("figures") < at("models"), "answer, figures, rows");
        assert!(at("answer") < page.find("<nav").unwrap(), "before anything else");
        assert!(page.contains("No figures of") && page.contains("damaged"), "what is missing is said");
        let ids: Vec<&str> = page.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), ids.len(), "ids are unique");
        assert_eq!(page.matches("<svg").count(), page.matches("<desc").count());
    }

    #[test]
    fn quantization_cost_comes_first_on_the_page() {
        let home = tempfile::tempdir().unwrap();
        let folder = copy("dense", &home.path().join("a"));
        let error = json!({"format": "mxfp4", "rotation": 0, "rows": 8, "error": 0.02, "share_in_outlier_blocks": 0.5,
                           "outlier_blocks": 0.5, "per_sequence": [0.01, 0.03]});
        let errors = json!({"rule": "r", "norm_outputs": [error], "sites": []});
        change(&folder, files::RESULTS, |results| results["quantization_error"] = errors);
        let page = page(&Comparison::of(read_all(&[home.path().to_owned()], false).unwrap()));
        assert!(page.contains(": 2.000 (1.000 to 3.000), 50 % of it in blocks with an outlier"), "{page}");
        let at = |id: &str| page.find(&format!(" id=\"{id}\"")).unwrap();
        assert!(at("cost-answer") < at("answer") && at("cost") < at("affected-parameters-paper"));
        assert!(at("model1-cost") < at("model1-magnitudes"));
        assert!(!page_of("a/b").contains("cost-answer"), "where it was measured");
    }

    #[test]
    fn every_plot_colour_follows_the_colour_scheme() {
        let page = page_of("a/b");
        let known: Vec<String> =
            Colour::ALL.iter().map(|(_, [r, g, b], _)| format!("#{r:02X}{g:02X}{b:02X}")).collect();
        for attribute in [" fill=\"#", " stroke=\"#"] {
            for rest in page.split(attribute).skip(1) {
                let colour = format!("#{}", &rest[..6]);
                assert!(known.contains(&colour), "{attribute}{colour}");
            }
        }
    }
}
