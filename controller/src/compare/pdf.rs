//! Converts a drawing to PDF: one page of its size, with lines and letters as shapes, without
//! fonts and pictures.

use std::fmt::Write;

use resvg::tiny_skia::{PathSegment, Point, Transform};
use resvg::usvg::{Color, Group, Node, Paint, Path};

use super::pixels::tree;

/// Converts an SVG to a PDF of this width in inches.
///
/// # Errors
/// An error in the drawing.
pub(crate) fn pdf(svg: &str, inches: f64) -> Result<Vec<u8>, String> {
    let tree = tree(svg)?;
    let size = tree.size();
    let width = inches * 72.0;
    let scale = width / f64::from(size.width());
    let height = f64::from(size.height()) * scale;
    // PDF coordinates start at the bottom.
    let mut shapes = format!("{scale:.6} 0 0 {:.6} 0 {height:.3} cm\n", -scale);
    nodes(tree.root(), Transform::identity(), &mut shapes);
    let page = format!("/MediaBox [0 0 {width:.3} {height:.3}] /Contents 4 0 R /Resources << >>");
    let objects = [
        "<< /Type /Catalog /Pages 2 0 R >>".to_owned(),
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>".to_owned(),
        format!("<< /Type /Page /Parent 2 0 R {page} >>"),
        format!("<< /Length {} >>\nstream\n{shapes}endstream", shapes.len()),
    ];
    let mut file = "%PDF-1.4\n".to_owned();
    let mut places = String::new();
    for (object, number) in objects.iter().zip(1..) {
        places += &format!("{:010} 00000 n \n", file.len());
        file += &format!("{number} 0 obj\n{object}\nendobj\n");
    }
    let (table, count) = (file.len(), objects.len() + 1);
    file += &format!("xref\n0 {count}\n0000000000 65535 f \n{places}");
    file += &format!("trailer\n<< /Size {count} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n");
    Ok(file.into_bytes())
}

/// The content of a group with its transform.
fn nodes(group: &Group, placed: Transform, out: &mut String) {
    for node in group.children() {
        match node {
            Node::Group(inner) => nodes(inner, placed.pre_concat(inner.transform()), out),
            Node::Path(path) => shape(path, placed, out),
            Node::Text(text) => {
                let letters = text.flattened();
                nodes(letters, placed.pre_concat(letters.transform()), out);
            }
            // The plots contain no images.
            Node::Image(_) => {}
        }
    }
}

/// A path with plain colours, the only ones in the plots.
fn shape(path: &Path, transform: Transform, out: &mut String) {
    let colour = |paint: &Paint| match paint {
        Paint::Color(colour) => Some(*colour),
        _ => None,
    };
    let fill = path.fill().and_then(|fill| colour(fill.paint()));
    let stroke = path.stroke().and_then(|stroke| Some((colour(stroke.paint())?, stroke.width().get())));
    if let Some(fill) = fill {
        set(fill, "rg", out);
    }
    if let Some((colour, width)) = stroke {
        set(colour, "RG", out);
        let _ = writeln!(out, "{:.3} w", width * transform.sx.hypot(transform.ky));
    }
    let end = match (fill, stroke) {
        (Some(_), Some(_)) => "B",
        (Some(_), None) => "f",
        (None, Some(_)) => "S",
        (None, None) => return,
    };
    outline(path, transform, out);
    let _ = writeln!(out, "{end}");
}

fn set(colour: Color, operator: &str, out: &mut String) {
    let [r, g, b] = [colour.red, colour.green, colour.blue].map(|part| f32::from(part) / 255.0);
    let _ = writeln!(out, "{r:.3} {g:.3} {b:.3} {operator}");
}

fn outline(path: &Path, transform: Transform, out: &mut String) {
    let place = |mut point: Point| {
        transform.map_point(&mut point);
        format!("{:.2} {:.2}", point.x, point.y)
    };
    let mut last = Point::zero();
    for segment in path.data().segments() {
        let line = match segment {
            PathSegment::MoveTo(to) => format!("{} m", place(to)),
            PathSegment::LineTo(to) => format!("{} l", place(to)),
            // PDF has only cubic curves, so the degree is raised.
            PathSegment::QuadTo(by, to) => {
                let third =
                    |end: Point| Point { x: end.x + 2.0 / 3.0 * (by.x - end.x), y: end.y + 2.0 / 3.0 * (by.y - end.y) };
                format!("{} {} {} c", place(third(last)), place(third(to)), place(to))
            }
            PathSegment::CubicTo(first, second, to) => {
                format!("{} {} {} c", place(first), place(second), place(to))
            }
            PathSegment::Close => "h".to_owned(),
        };
        let _ = writeln!(out, "{line}");
        match segment {
            PathSegment::MoveTo(to)
            | PathSegment::LineTo(to)
            | PathSegment::QuadTo(_, to)
            | PathSegment::CubicTo(_, _, to) => last = to,
            PathSegment::Close => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SVG: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"100\" height=\"50\">\
        <rect width=\"10\" height=\"10\" fill=\"#FF0000\"/>\
        <path d=\"M0 0 L10 10\" stroke=\"#0000FF\" stroke-width=\"3\" fill=\"none\"/>\
        <text x=\"5\" y=\"40\" font-family=\"sans-serif\" font-size=\"20\">o</text></svg>";

    #[test]
    fn pdf_has_shapes_and_text_at_the_requested_width() {
        let text = String::from_utf8(pdf(SVG, 1.0).unwrap()).unwrap();
        assert!(text.starts_with("%PDF-1.4\n") && text.ends_with("%%EOF\n"));
        for said in ["/MediaBox [0 0 72.000 36.000]", "1.000 0.000 0.000 rg", "0.000 0.000 1.000 RG", "3.000 w", " c\n"]
        {
            assert!(text.contains(said), "{said}: {text}");
        }
        assert!(!text.contains("/Font") && !text.contains("/Image"));
        // Every object is at its offset in the table.
        let table: usize = text.rsplit_once("startxref\n").unwrap().1.lines().next().unwrap().parse().unwrap();
        assert!(text[table..].starts_with("xref\n0 5\n"));
        for (line, number) in text[table..].lines().skip(3).take(4).zip(1..) {
            let place: usize = line[..10].parse().unwrap();
            assert!(text[place..].starts_with(&format!("{number} 0 obj\n")), "{number}");
        }
    }

    #[test]
    fn invalid_svg_is_an_error() {
        assert!(pdf("<svg", 1.0).is_err());
    }
}
