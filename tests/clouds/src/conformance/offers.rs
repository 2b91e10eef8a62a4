//! What is for rent: in our units, at the price of everything, and nothing that cannot be compared.

use outliers::broker::{BrokerErrorKind, GpuRequest, Offer, Offers, Tier};
use outliers::units::{Bytes, Usd};

use super::{DISK_GIB, find, kind, lease, want};
use crate::{FakeCloud, Op, Stock};

/// Gigabytes that one says and the other understands as gibibytes are 7 % apart; wrong units are further.
const ROUNDING: f64 = 0.08;

/// Every offer says what it is in our units; what its cloud does not tell is unknown.
pub async fn are_in_our_units(cloud: &FakeCloud) {
    for stock in shown(cloud).iter().filter(|stock| stock.is_plain()) {
        let offers = offers(cloud, stock, false).await;
        let offer = find(&offers, stock).unwrap_or_else(|| panic!("{stock:?} is offered: {offers:?}"));
        assert_eq!(offer.broker, cloud.dialect().cloud().name);
        assert_eq!(offer.vram, Some(Bytes::from_gib(stock.gpu.sold_gib())), "as it is sold: {offer:?}");
        assert!(offer.vram_reported.is_none_or(|reported| Some(reported) <= offer.vram), "{offer:?}");
        assert_about(offer.cpu_ram, stock.ram_gib, "memory of the host", offer);
        if let Some(disk) = offer.disk {
            assert_about(Some(disk), Some(stock.disk_gib), "disk", offer);
        }
        assert!(offer.cpu_cores.is_none_or(|cores| cores == stock.cores), "{offer:?}");
        let tier = if stock.secure { Tier::Secure } else { Tier::Community };
        assert!(offer.tier.is_none_or(|told| told == tier), "{offer:?}");
    }
}

/// A price is that of the whole instance, the disk asked for included.
pub async fn are_priced_whole(cloud: &FakeCloud) {
    for stock in shown(cloud).iter().filter(|stock| stock.is_plain()) {
        let offers = offers(cloud, stock, false).await;
        let offer = find(&offers, stock).unwrap_or_else(|| panic!("{stock:?} is offered: {offers:?}"));
        let price = cloud.dialect().price(stock, DISK_GIB);
        let apart = offer.price.0.micros().abs_diff(price.0.micros());
        assert!(apart < 1000, "{} is offered, {price} is right: {offer:?}", offer.price);
    }
}

/// What is sold out, priced in other money or paid in advance is no offer; where it is shown, a reason is given.
pub async fn are_what_can_be_had(cloud: &FakeCloud) {
    for stock in shown(cloud).iter().filter(|stock| !stock.is_plain() && !stock.spot) {
        let offers = offers(cloud, stock, true).await;
        assert_eq!(find(&offers, stock), None, "{stock:?}");
        if stock.left > 0 {
            assert!(!offers.dropped.is_empty(), "a reason is given: {stock:?}");
        }
    }
}

/// What may be taken back is offered to those who say that they take it, and is marked.
pub async fn may_be_taken_back_only_if_wanted(cloud: &FakeCloud) {
    let spot = cloud.dialect();
    let capable = cloud.broker().capabilities().spot;
    for stock in shown(cloud).iter().filter(|stock| stock.spot) {
        let unasked = offers(cloud, stock, false).await;
        assert!(unasked.offers.iter().all(|offer| !offer.spot), "{unasked:?}");
        let asked = offers(cloud, stock, true).await;
        assert_eq!(find(&asked, stock).is_some(), capable, "{}: {asked:?}", spot.cloud().name);
    }
}

/// An account whose cloud has nothing is told so without an error.
pub async fn may_be_none(cloud: &FakeCloud) {
    cloud.world().stock.clear();
    let offers = cloud.broker().offers(&want()).await.expect("nothing is an answer too");
    assert_eq!(offers.offers, []);
}

/// Nothing is rented for a key that is not the cloud's own, and no request is made of it.
pub async fn of_others_are_refused(cloud: &FakeCloud) {
    let broker = cloud.broker();
    for key in ["", "{}", "null", "../../instances", "{\"x\": 1}"] {
        let offer = Offer::new("elsewhere", key.to_owned(), 1, Default::default());
        let made = broker.create(&offer, &lease()).await;
        assert_eq!(kind(&made), Some(BrokerErrorKind::Rejected), "{key:?}: {made:?}");
    }
    assert_eq!(cloud.world().count(Op::Create), 0);
}

/// A thousand offers are read.
pub async fn may_be_many(cloud: &FakeCloud) {
    let plain = Stock::mixed()[0].clone();
    cloud.world().stock = (0..1000).map(|at| many(&plain, at)).collect();
    let listed = cloud.broker().offers(&want()).await.expect("they are read");
    assert!(!listed.offers.is_empty());
}

fn many(plain: &Stock, at: i64) -> Stock {
    let price = outliers::units::UsdPerHour(plain.price.0 + Usd::from_micros(at * 10_000));
    Stock { id: (2000 + at).to_string(), price, ..plain.clone() }
}

fn shown(cloud: &FakeCloud) -> Vec<Stock> {
    let stock = cloud.world().stock.clone();
    let shown: Vec<Stock> = stock.iter().filter_map(|stock| cloud.dialect().shows(stock)).collect();
    assert!(shown.iter().any(Stock::is_plain), "every cloud has something");
    shown
}

async fn offers(cloud: &FakeCloud, stock: &Stock, spot: bool) -> Offers {
    let want = GpuRequest { gpu_count: Some(stock.gpus), spot, ..want() };
    cloud.broker().offers(&want).await.expect("a cloud that works shows its offers")
}

fn assert_about(told: Option<Bytes>, gib: Option<u64>, what: &str, offer: &Offer) {
    let about = |told: Bytes, gib: u64| (told.gib() / gib as f64 - 1.0).abs() < ROUNDING;
    match (told, gib) {
        (Some(told), Some(gib)) if about(told, gib) => {}
        (None, None) => {}
        _ => panic!("{what} is {told:?}, {gib:?} GiB is right: {offer:?}"),
    }
}
