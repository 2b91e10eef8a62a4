//! Converts a drawing to pixels.
//!
//! The font is built in, so that pictures are identical on every machine, also without installed
//! fonts.

use std::sync::{Arc, LazyLock};

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb};

/// Ubuntu Light, sans-serif, under the Ubuntu Font Licence, which allows bundling.
static FONTS: LazyLock<Arc<fontdb::Database>> = LazyLock::new(|| {
    let mut fonts = fontdb::Database::new();
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    let family = fonts.faces().next().map(|face| face.families[0].0.clone());
    fonts.set_sans_serif_family(family.expect("it is a font, which has a name"));
    Arc::new(fonts)
});

/// Parses an SVG into shapes, letters included.
///
/// # Errors
/// An error in the drawing.
pub(super) fn tree(svg: &str) -> Result<Tree, String> {
    let options = Options { fontdb: Arc::clone(&FONTS), ..Options::default() };
    Tree::from_str(svg, &options).map_err(|error| error.to_string())
}

/// Converts an SVG to a PNG of this width in pixels. Without a width, one pixel per SVG unit.
///
/// # Errors
/// An error in the drawing.
pub(crate) fn png(svg: &str, width: Option<u32>) -> Result<Vec<u8>, String> {
    let tree = tree(svg)?;
    let size = tree.size();
    let scale = width.map_or(1.0, |width| width as f32 / size.width());
    let side = |length: f32| (length * scale).round() as u32;
    let mut pixels = Pixmap::new(side(size.width()), side(size.height())).ok_or("it has no size")?;
    resvg::render(&tree, Transform::from_scale(scale, scale), &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::comparison::Comparison;
    use super::super::fixture::{copy, rename};
    use super::super::folder::read_all;
    use super::super::plots;
    use super::*;

    /// Removes all text elements' content.
    fn without_text(svg: &str) -> String {
        let parts = svg.split("<text").enumerate();
        parts.map(|(i, part)| if i == 0 { part } else { part.split_once("</text>").unwrap().1 }).collect()
    }

    fn pixels(svg: &str) -> Pixmap {
        Pixmap::decode_png(&png(svg, None).unwrap()).unwrap()
    }

    #[test]
    fn png_has_the_size_colours_and_text_of_each_plot() {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("mixture", &home.path().join("a")), "<a href='x'>&\u{202e}");
        copy("dense", &home.path().join("b"));
        let compared = Comparison::of(read_all(&[home.path().to_owned()], false).unwrap());
        let of_models = compared.models.iter().flat_map(plots::of_model);
        for plot in plots::across(&compared).into_iter().chain(of_models) {
            let (picture, silent) = (pixels(&plot.svg), pixels(&without_text(&plot.svg)));
            let size = format!("viewBox=\"0 0 {} {}\"", picture.width(), picture.height());
            assert!(plot.svg.contains(&size), "{}: {size}", plot.name);
            let colours: BTreeSet<_> = picture.pixels().iter().map(|p| (p.red(), p.green(), p.blue())).collect();
            assert!(colours.len() > 5, "{}: {colours:?}", plot.name);
            assert!(picture.pixels().iter().all(|pixel| pixel.alpha() == 255), "{}: see-through", plot.name);
            let letters = picture.pixels().iter().zip(silent.pixels()).filter(|(a, b)| a != b).count();
            assert!(letters > 1000, "{}: {letters} pixels of text", plot.name);
        }
    }

    #[test]
    fn invalid_svg_is_an_error() {
        for text in ["", "<svg", "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"0\" height=\"0\"/>"] {
            assert!(png(text, None).is_err(), "{text}");
        }
    }
}
